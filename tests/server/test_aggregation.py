"""When pushes are counted in, and when answered."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Head, Kind, State
from tests.support.protocol_clients import centre, drawn, group

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
        _, answer = talkers[i].answer()
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
