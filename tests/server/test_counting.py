"""When pushes are counted in, and when answered, whatever clients do meanwhile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from talkers import Talker, contract_of

from hpcsgd.links import Head, Kind, State
from hpcsgd.server import Policy, Server


def group(server: Server, count: int, size: int = 5, dtype: str = "float32", **more: Any) -> list[Talker]:
    """Clients that have the first values, which are zero."""
    contract = contract_of([size], server.policy.mode, dtype)
    found = [Talker(server, f"g{i}", contract, **more) for i in range(count)]
    found[0].fill(np.zeros(size, dtype))
    for talker in found:
        talker.fetch(0, dtype)
    return found


def centre(server: Server) -> np.ndarray:
    values = server.shards[0].centre
    assert values is not None
    return values.numpy()


def drawn(seed: int, size: int = 5, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


# Together.


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_sync_is_the_mean_in_the_order_of_names(order: tuple[int, ...]) -> None:
    server = Server(Policy("sync"))
    talkers = group(server, 3, 3000)
    for step in range(3):
        gradients = [drawn(10 * step + i, 3000) for i in range(3)]
        before = centre(server).copy()
        for i in order:
            server.begin(None)  # all take part
            assert not talkers[i].heard
            talkers[i].push(gradients[i])
        wanted = before - (gradients[0] + gradients[1] + gradients[2]) * np.float32(1 / 3)
        for talker in talkers:
            talker.listen()
            head, values = talker.answer()
            assert (head.state, head.version, head.round) == (State.DONE, step + 1, step + 1)
            np.testing.assert_array_equal(values, wanted)
        np.testing.assert_array_equal(centre(server), wanted)


def test_sync_counts_gradients_not_clients() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2, dtype="float64")
    server.begin(None)
    one.push(np.full(5, 1.0), weight=3.0)
    two.push(np.full(5, 5.0), weight=1.0)
    np.testing.assert_allclose(centre(server), -2.0)


def test_a_gradient_that_is_not_finite_holds_up_nobody() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2)
    server.begin(None)
    one.push(np.full(5, np.nan, np.float32), weight=0.0)
    two.push(np.ones(5, np.float32), weight=4.0)
    np.testing.assert_array_equal(centre(server), -1)
    for talker in (one, two):
        talker.listen()
        talker.push(np.full(5, np.inf, np.float32), weight=0.0)
    np.testing.assert_array_equal(centre(server), -1)
    assert server.shards[0].version == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elastic_together_is_its_formula(dtype: str) -> None:
    server = Server(Policy("elastic", alpha=0.25, max_staleness=0))
    talkers = group(server, 3, dtype=dtype)
    models = [drawn(i, dtype=dtype) for i in range(3)]
    for _ in range(4):
        before = centre(server).copy()
        server.begin(None)
        for talker, model in zip(talkers, models, strict=True):
            talker.push(model)
        forces = [np.dtype(dtype).type(0.25) * (model - before) for model in models]
        np.testing.assert_array_equal(centre(server), before + forces[0] + forces[1] + forces[2])
        for i, talker in enumerate(talkers):
            talker.listen()
            _, answer = talker.answer(dtype)
            np.testing.assert_array_equal(answer, forces[i])
            models[i] = models[i] - answer


def test_without_an_alpha_as_many_share_it_as_count() -> None:
    server = Server(Policy("elastic"))
    talkers = group(server, 3, dtype="float64")
    server.begin(None)
    talkers[0].push(np.ones(5))
    np.testing.assert_allclose(talkers[0].answer("float64")[1], 0.3)
    server.lose(talkers[2].far, "test")
    before = centre(server).copy()
    talkers[1].push(np.ones(5))
    np.testing.assert_allclose(talkers[1].answer("float64")[1], 0.45 * (1 - before))


# One by one.


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_elastic_one_by_one_is_its_formula(order: list[int]) -> None:
    server = Server(Policy("elastic", alpha=0.3))
    talkers = group(server, 4)
    models, c, alpha = [drawn(i) for i in range(4)], np.zeros(5, np.float32), np.float32(0.3)
    for i in order:
        talkers[i].push(models[i])
        force = alpha * (models[i] - c)
        head, answer = talkers[i].answer()
        c = c + force
        models[i] = models[i] - answer
        np.testing.assert_array_equal(answer, force)
        np.testing.assert_array_equal(centre(server), c)
    assert server.shards[0].version == len(order) == sum(server.counting.staleness.values())


@pytest.mark.parametrize("fused", [False, True])
def test_async_with_one_client_is_serial_sgd(fused: bool) -> None:
    server = Server(Policy("async", max_staleness=3))
    (talker,) = group(server, 1, 40, options=[{"lr": 0.1, "momentum": 0.9, "fused": fused}])
    p = torch.zeros(40, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=fused)
    values = np.zeros(40, np.float32)
    for step in range(6):
        gradient = values * 2 - drawn(step, 40)
        p.grad = 2 * p.detach() - torch.from_numpy(drawn(step, 40))
        optimizer.step()
        talker.push(gradient)
        values = talker.answer()[1]
        np.testing.assert_array_equal(values, p.detach().numpy())
    assert server.counting.staleness == {0: 6}


def test_a_push_alone_is_answered_without_values() -> None:
    server = Server(Policy("async"))
    (talker,) = group(server, 1)
    talker.say(Head(Kind.PUSH, round=1, weight=1.0), np.ones(20, np.uint8))
    head, values = talker.answer()
    assert (head.state, head.round, values.size) == (State.DONE, 1, 0)
    assert server.shards[0].version == 1


# Who is not heard.


def test_who_is_gone_in_the_middle_of_a_round_is_not_waited_for() -> None:
    server = Server(Policy("sync"))
    one, two, three = group(server, 3)
    server.begin(None)
    one.push(np.full(5, 1, np.float32))
    two.push(np.full(5, 5, np.float32))
    assert not one.heard
    server.lose(two.far, "test")
    assert not one.heard  # for the third
    server.lose(three.far, "test")
    one.listen()
    assert one.answer()[0].state is State.DONE
    np.testing.assert_array_equal(centre(server), -1)
    # Of the second nothing was acknowledged: it asks again, and is told that it was too late.
    two.connect()
    two.rounds = {}
    two.push(np.full(5, 5, np.float32))
    head, values = two.answer()
    assert head.state is State.LATE and head.version == 1
    np.testing.assert_array_equal(values, -1)
    assert server.counting.left_out == 1
    # From then on it counts again.
    one.push(np.full(5, 1, np.float32))
    assert not one.heard
    two.push(np.full(5, 3, np.float32))
    np.testing.assert_array_equal(centre(server), -3)


def test_a_push_that_was_left_out_is_left_out_when_it_comes_again() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2)
    server.begin(None)
    server.lose(two.far, "test")
    one.push(np.ones(5, np.float32))
    for _ in range(3):
        two.connect()
        two.rounds = {}
        two.push(np.ones(5, np.float32))
        assert two.answer()[0].state is State.LATE
        two.versions = {}
    assert server.counting.left_out == 1 and server.shards[0].version == 1


def test_a_push_that_comes_again_gets_the_same_answer() -> None:
    server = Server(Policy("elastic", alpha=0.5))
    (talker,) = group(server, 1)
    talker.push(np.full(5, 8, np.float32))
    first = talker.answer()[1]
    for _ in range(2):
        talker.connect()
        talker.rounds = {}
        talker.push(np.full(5, 8, np.float32))
        np.testing.assert_array_equal(talker.answer()[1], first)
    np.testing.assert_array_equal(centre(server), 4)
    assert server.shards[0].version == 1


def test_an_answer_on_its_way_is_not_written_over_by_the_same_push_again() -> None:
    server = Server(Policy("elastic", alpha=0.5))
    (talker,) = group(server, 1)
    head = Head(Kind.PUSHPULL, round=1, weight=1.0, nbytes=20)
    talker.link.send(head, np.full(5, 8, np.float32))
    talker.deliver()
    server.lose(talker.far, "test")
    talker.connect()
    talker.link.send(head, np.full(5, 8, np.float32))
    talker.deliver()  # its answer has not left
    server.lose(talker.far, "test")
    talker.connect()
    talker.say(head, np.full(5, 8, np.float32))
    np.testing.assert_array_equal(talker.answer()[1], 4)


def test_nobody_is_let_ahead_by_asking_again() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    one.push(np.ones(5, np.float32))
    assert one.answer()[0].round == 1
    one.push(np.ones(5, np.float32))
    assert not one.heard
    server.lose(one.far, "test")
    one.connect()
    one.rounds[0] = 1
    one.push(np.ones(5, np.float32))
    assert not one.heard and server.shards[0].version == 2
    two.push(np.ones(5, np.float32))
    one.listen()
    assert one.answer()[0].version == 3


def test_who_waits_for_the_last_that_counted_is_answered() -> None:
    """Even where it has itself been silent meanwhile."""
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    one.push(np.ones(5, np.float32))
    one.push(np.ones(5, np.float32))
    assert one.answer()[0].round == 1
    one.far.heard = -math.inf
    server.watch()
    two.say(Head(Kind.REST))
    one.listen()
    assert one.answer()[0].round == 2


def test_who_has_fallen_far_behind_goes_on_from_where_the_others_are() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    two.far.heard = -math.inf
    server.watch()
    for _ in range(10):
        one.push(np.ones(5, np.float32))
        assert one.answer()[0].state is State.DONE
    two.push(np.ones(5, np.float32))
    assert two.answer()[0].state is State.LATE
    for _ in range(5):
        for talker in (one, two):
            talker.push(np.ones(5, np.float32))
            assert talker.answer()[0].state is State.DONE
    assert max(server.counting.staleness) <= 3


@pytest.mark.parametrize("s", [1, 2, 3])
def test_so_far_behind_is_too_late_and_no_less(s: int) -> None:
    for pushes in range(1, s + 4):
        server = Server(Policy("async", max_staleness=s))
        one, two = group(server, 2)
        server.begin(None)
        two.far.heard = -math.inf
        server.watch()
        for _ in range(pushes):
            one.push(np.ones(5, np.float32))
            one.answer()
        two.push(np.ones(5, np.float32))
        assert (two.answer()[0].state is State.LATE) == (pushes > s + 1)


def test_what_those_have_pushed_who_rest_makes_a_push_late_too() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    two.far.heard = -math.inf
    server.watch()
    for _ in range(10):
        one.push(np.ones(5, np.float32))
        one.answer()
    one.say(Head(Kind.REST))
    two.push(np.ones(5, np.float32))
    assert two.answer()[0].state is State.LATE
    assert set(server.counting.staleness) == {0}


def test_to_look_at_the_values_is_not_to_take_part() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2)
    server.begin(None)
    two.say(Head(Kind.REST))
    two.fetch()
    one.push(np.ones(5, np.float32))
    assert one.answer()[0].state is State.DONE


def test_clients_that_a_state_does_not_know_count_too() -> None:
    server = Server(Policy("async", max_staleness=1))
    (one,) = group(server, 1)
    for _ in range(4):
        one.push(np.ones(5, np.float32))
        one.answer()
    state = server.shards[0].state_dict()
    other = Server(Policy("async", max_staleness=1))
    two = group(other, 2)[1]
    other.shards[0].load_state_dict(state)
    np.testing.assert_array_equal(centre(other), -4)
    two.fetch()
    two.push(np.ones(5, np.float32))
    assert two.answer()[0].state is State.DONE


# Whatever happens.


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
    [("sync", None), ("async", None), ("async", 1), ("async", 2), ("elastic", None), ("elastic", 0)]
    + [("elastic", 1)],
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
