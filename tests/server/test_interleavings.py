"""Invariants of all pushes while clients stall, disconnect, reconnect and repeat requests."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from tests.support.protocol_clients import centre, make_clients, random_values


class Scenario:
    """Clients that push, stall, disconnect and reconnect, with checks of the invariants after each action."""

    def __init__(self, mode: str, count: int, max_staleness: int | None) -> None:
        self.applied: list[tuple[str, int, np.ndarray]] = []
        self.updates = 0
        self.server = Server(Policy(mode, 0.25, max_staleness, lease=1e6), record=self.record)
        self.clients = make_clients(self.server, count, 3, "float64")
        self.server.start_steps(None)
        self.models = [random_values(i, 3, np.float64) for i in range(count)]
        self.sent: list[tuple[Header, np.ndarray] | None] = [None] * count
        self.statuses: dict[tuple[str, int], ReplyStatus] = {}
        self.interrupted = False
        self.sum = sum(self.models)

    def record(self, shard: Any, pushes: list[Any], terms: Any) -> None:
        if terms.weights:
            self.updates += 1
            names = [push.client for push in pushes]
            assert names == sorted(names)
            self.applied += [(p.client, p.number, p.values.view(np.float64).copy()) for p in pushes]

    def act(self, what: str, i: int) -> None:
        client = self.clients[i]
        before = {t.name: len(t.server_link.outgoing) for t in self.clients}
        self.interrupted |= what in ("disconnect", "silence", "pause")
        if what == "push" and self.sent[i] is None and client.admitted:
            client.push_numbers[0] = number = client.push_numbers.get(0, 0) + 1
            version = client.versions[0]
            header = Header(MessageType.PUSHPULL, push_number=number, weight=1.0, version=version, nbytes=24)
            self.sent[i] = header, self.models[i].copy()
            self.again(i)
        elif what == "receive":
            self.receive(i)
        elif what == "disconnect" and client.admitted:
            client.link.close()
            client.deliver()
        elif what == "reconnect" and not client.admitted:
            client.connect()
            if self.sent[i] is not None:
                self.again(i)
        elif what == "silence" and client.admitted:
            client.server_link.last_received = -math.inf
            self.server.check_leases()
        elif what in ("heartbeat", "pause") and client.admitted:
            client.link.send(Header(MessageType[what.upper()]))
            client.deliver()
        self.check({t.name for t in self.clients if len(t.server_link.outgoing) > before[t.name]})

    def again(self, i: int) -> None:
        sent = self.sent[i]
        assert sent is not None
        self.clients[i].link.send(*sent)
        self.clients[i].deliver()

    def receive(self, i: int) -> None:
        self.clients[i].receive()
        for header, body in self.clients[i].received:
            assert self.sent[i] is not None and header.push_number == self.sent[i][0].push_number
            self.statuses[self.clients[i].name, header.push_number] = header.status
            self.sent[i] = None
            if self.server.policy.mode == "elastic":
                self.models[i] = self.models[i] - body.view(np.float64)
        self.clients[i].received.clear()

    def check(self, answered: set[str]) -> None:
        server, shard = self.server, self.server.shards[0]
        s = server.policy.max_staleness
        counting = [c for c in server.sessions.values() if c.is_awaited and 0 in c.subscribed]
        slowest = min((shard.clocks[c.name] for c in counting), default=math.inf)
        for client in server.sessions.values():
            if 0 in client.pending_replies:  # another client is awaited
                missing = server.policy.synchronous and client.name in shard.pending
                ahead = s is not None and shard.clocks[client.name] - slowest > s
                assert any(c.name not in shard.pending for c in counting) if missing else ahead
            if s and client.name in answered:
                assert shard.clocks[client.name] - slowest <= s
        assert shard.version == self.updates

    def end(self) -> None:
        """Let all clients reconnect, receive their replies, and pause."""
        for _ in range(3):
            for i in range(len(self.clients)):
                self.act("reconnect", i)
                self.receive(i)
            for i in range(len(self.clients)):
                if self.sent[i] is None:
                    self.act("pause", i)
                self.receive(i)
        assert self.sent == [None] * len(self.clients)
        applied = [(name, number) for name, number, _ in self.applied]
        assert len(applied) == len(set(applied))
        assert set(applied) == {push for push, state in self.statuses.items() if state is ReplyStatus.OK}
        assert len(self.statuses) - len(applied) == self.server.aggregator.dropped
        assert sum(self.server.aggregator.staleness.values()) == len(applied)
        if self.server.policy.mode == "elastic":
            assert self.server.aggregator.dropped == 0
            np.testing.assert_allclose(centre(self.server) + sum(self.models), self.sum, atol=1e-12)
        elif self.server.policy.synchronous:
            assert set(self.server.aggregator.staleness) <= {0}
        else:
            np.testing.assert_allclose(centre(self.server), -sum(v for _, _, v in self.applied) + np.zeros(3))
            s = self.server.policy.max_staleness
            if s is not None:
                each = 2 * s + 2 if self.interrupted else 2 * s + 1
                assert max(self.server.aggregator.staleness, default=0) <= (len(self.clients) - 1) * each


ACTIONS = (
    "push",
    "push",
    "push",
    "receive",
    "receive",
    "disconnect",
    "reconnect",
    "silence",
    "heartbeat",
    "pause",
)
SCENARIOS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3)), min_size=15, max_size=60)


@pytest.mark.parametrize(
    ("mode", "max_staleness"),
    [(m, s) for m in ("sync", "async", "elastic") for s in (None, 0, 1, 2) if m != "sync" or s is None],
)
@given(st.integers(1, 4), SCENARIOS)
@settings(max_examples=50, deadline=None)
def test_every_push_is_applied_once_or_reported_late(
    mode: str, max_staleness: int | None, count: int, acts: list[tuple[str, int]]
) -> None:
    scenario = Scenario(mode, count, max_staleness)
    for what, i in acts:
        scenario.act(what, i % count)
    scenario.end()


@given(st.integers(2, 4), st.integers(1, 2), st.lists(st.integers(0, 7), min_size=20, max_size=120))
@settings(max_examples=60, deadline=None)
def test_staleness_is_bounded(count: int, s: int, acts: list[int]) -> None:
    scenario = Scenario("async", count, s)
    for act in acts:
        scenario.act(("push", "receive")[act % 2], act // 2 % count)
    assert not scenario.interrupted
    staleness = scenario.server.aggregator.staleness
    assert max(staleness, default=0) <= (count - 1) * (2 * s + 1)
    assert scenario.server.aggregator.dropped == 0
