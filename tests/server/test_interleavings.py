"""What holds for every push, whatever clients do: they stall, break off, return and ask again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Head, Kind, State
from tests.support.protocol_clients import centre, drawn, group


class Story:
    """Clients that push, stall, break off and return, and what must hold all the time."""

    def __init__(self, mode: str, count: int, max_staleness: int | None) -> None:
        self.made: list[tuple[str, int, np.ndarray]] = []
        self.updates = 0
        self.server = Server(Policy(mode, 0.25, max_staleness, lease=1e6), record=self.record)
        self.talkers = group(self.server, count, 3, "float64")
        self.server.begin(None)
        self.models = [drawn(i, 3, np.float64) for i in range(count)]
        self.sent: list[tuple[Head, np.ndarray] | None] = [None] * count
        self.said: dict[tuple[str, int], State] = {}
        self.interrupted = False
        self.sum = sum(self.models)

    def record(self, shard: Any, pushes: list[Any], terms: Any) -> None:
        if terms.weights:
            self.updates += 1
            names = [push.client for push in pushes]
            assert names == sorted(names)
            self.made += [(p.client, p.number, p.values.view(np.float64).copy()) for p in pushes]

    def act(self, what: str, i: int) -> None:
        talker = self.talkers[i]
        before = {t.name: len(t.far.leaving) for t in self.talkers}
        self.interrupted |= what in ("drop", "silence", "rest")
        if what == "push" and self.sent[i] is None and talker.let_in:
            talker.rounds[0] = number = talker.rounds.get(0, 0) + 1
            version = talker.versions[0]
            head = Head(Kind.PUSHPULL, round=number, weight=1.0, version=version, nbytes=24)
            self.sent[i] = head, self.models[i].copy()
            self.again(i)
        elif what == "hear":
            self.hear(i)
        elif what == "drop" and talker.let_in:
            talker.link.close()
            talker.deliver()
        elif what == "return" and not talker.let_in:
            talker.connect()
            if self.sent[i] is not None:
                self.again(i)
        elif what == "silence" and talker.let_in:
            talker.far.heard = -math.inf
            self.server.watch()
        elif what in ("beat", "rest") and talker.let_in:
            talker.link.send(Head(Kind[what.upper()]))
            talker.deliver()
        self.check({t.name for t in self.talkers if len(t.far.leaving) > before[t.name]})

    def again(self, i: int) -> None:
        sent = self.sent[i]
        assert sent is not None
        self.talkers[i].link.send(*sent)
        self.talkers[i].deliver()

    def hear(self, i: int) -> None:
        self.talkers[i].listen()
        for head, body in self.talkers[i].heard:
            assert self.sent[i] is not None and head.round == self.sent[i][0].round
            self.said[self.talkers[i].name, head.round] = head.state
            self.sent[i] = None
            if self.server.policy.mode == "elastic":
                self.models[i] = self.models[i] - body.view(np.float64)
        self.talkers[i].heard.clear()

    def check(self, answered: set[str]) -> None:
        server, shard = self.server, self.server.shards[0]
        s = server.policy.max_staleness
        counting = [c for c in server.clients.values() if c.counts and 0 in c.has]
        slowest = min((shard.clocks[c.name] for c in counting), default=math.inf)
        for client in server.clients.values():
            if 0 in client.owed:  # there is somebody for whom it waits
                missing = server.policy.together and client.name in shard.waiting
                ahead = s is not None and shard.clocks[client.name] - slowest > s
                assert any(c.name not in shard.waiting for c in counting) if missing else ahead
            if s and client.name in answered:
                assert shard.clocks[client.name] - slowest <= s
        assert shard.version == self.updates

    def end(self) -> None:
        """All return, hear what they are answered, and rest."""
        for _ in range(3):
            for i in range(len(self.talkers)):
                self.act("return", i)
                self.hear(i)
            for i in range(len(self.talkers)):
                if self.sent[i] is None:
                    self.act("rest", i)
                self.hear(i)
        assert self.sent == [None] * len(self.talkers)
        made = [(name, number) for name, number, _ in self.made]
        assert len(made) == len(set(made))
        assert set(made) == {push for push, state in self.said.items() if state is State.DONE}
        assert len(self.said) - len(made) == self.server.counting.left_out
        assert sum(self.server.counting.staleness.values()) == len(made)
        if self.server.policy.mode == "elastic":
            assert self.server.counting.left_out == 0
            np.testing.assert_allclose(centre(self.server) + sum(self.models), self.sum, atol=1e-12)
        elif self.server.policy.together:
            assert set(self.server.counting.staleness) <= {0}
        else:
            np.testing.assert_allclose(centre(self.server), -sum(v for _, _, v in self.made) + np.zeros(3))
            s = self.server.policy.max_staleness
            if s is not None:
                each = 2 * s + 2 if self.interrupted else 2 * s + 1
                assert max(self.server.counting.staleness, default=0) <= (len(self.talkers) - 1) * each


ACTIONS = ("push", "push", "push", "hear", "hear", "drop", "return", "silence", "beat", "rest")
STORIES = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), min_size=15, max_size=60)


@pytest.mark.parametrize(
    ("mode", "max_staleness"),
    [(m, s) for m in ("sync", "async", "elastic") for s in (None, 0, 1, 2) if m != "sync" or s is None],
)
@given(st.integers(1, 4), STORIES)
@settings(max_examples=50, deadline=None)
def test_every_push_is_counted_once_or_said_to_be_late(
    mode: str, max_staleness: int | None, count: int, acts: list[tuple[str, int]]
) -> None:
    story = Story(mode, count, max_staleness)
    for what, i in acts:
        story.act(what, i % count)
    story.end()


@given(st.integers(2, 4), st.integers(1, 2), st.lists(st.integers(0, 7), min_size=20, max_size=120))
@settings(max_examples=60, deadline=None)
def test_staleness_is_bounded(count: int, s: int, acts: list[int]) -> None:
    story = Story("async", count, s)
    for act in acts:
        story.act(("push", "hear")[act % 2], act // 2 % count)
    assert not story.interrupted
    staleness = story.server.counting.staleness
    assert max(staleness, default=0) <= (count - 1) * (2 * s + 1)
    assert story.server.counting.left_out == 0
