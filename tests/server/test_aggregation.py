"""Aggregation of pushes: updates and replies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from tests.support.protocol_clients import centre, make_clients, random_values

# Synchronous.


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_sync_is_the_mean_in_the_order_of_names(order: tuple[int, ...]) -> None:
    server = Server(Policy("sync"))
    clients = make_clients(server, 3, 3000)
    for step in range(3):
        gradients = [random_values(10 * step + i, 3000) for i in range(3)]
        before = centre(server).copy()
        for i in order:
            server.start_steps(None)  # all clients are awaited
            assert not clients[i].received
            clients[i].push(gradients[i])
        wanted = before - (gradients[0] + gradients[1] + gradients[2]) * np.float32(1 / 3)
        for client in clients:
            client.receive()
            header, values = client.pop_reply()
            assert (header.status, header.version, header.push_number) == (ReplyStatus.OK, step + 1, step + 1)
            np.testing.assert_array_equal(values, wanted)
        np.testing.assert_array_equal(centre(server), wanted)


def test_sync_mean_is_weighted_by_gradients() -> None:
    server = Server(Policy("sync"))
    one, two = make_clients(server, 2, dtype="float64")
    server.start_steps(None)
    one.push(np.full(5, 1.0), weight=3.0)
    two.push(np.full(5, 5.0), weight=1.0)
    np.testing.assert_allclose(centre(server), -2.0)


def test_gradient_of_weight_0_does_not_delay_the_others() -> None:
    server = Server(Policy("sync"))
    one, two = make_clients(server, 2)
    server.start_steps(None)
    one.push(np.full(5, np.nan, np.float32), weight=0.0)
    two.push(np.ones(5, np.float32), weight=4.0)
    np.testing.assert_array_equal(centre(server), -1)
    for client in (one, two):
        client.receive()
        client.push(np.full(5, np.inf, np.float32), weight=0.0)
    np.testing.assert_array_equal(centre(server), -1)
    assert server.shards[0].version == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_synchronous_elastic_is_its_formula(dtype: str) -> None:
    server = Server(Policy("elastic", alpha=0.25, max_staleness=0))
    clients = make_clients(server, 3, dtype=dtype)
    models = [random_values(i, dtype=dtype) for i in range(3)]
    for _ in range(4):
        before = centre(server).copy()
        server.start_steps(None)
        for client, model in zip(clients, models, strict=True):
            client.push(model)
        forces = [np.dtype(dtype).type(0.25) * (model - before) for model in models]
        np.testing.assert_array_equal(centre(server), before + forces[0] + forces[1] + forces[2])
        for i, client in enumerate(clients):
            client.receive()
            _, answer = client.pop_reply(dtype)
            np.testing.assert_array_equal(answer, forces[i])
            models[i] = models[i] - answer


def test_default_alpha_depends_on_the_awaited_clients() -> None:
    server = Server(Policy("elastic"))
    clients = make_clients(server, 3, dtype="float64")
    server.start_steps(None)
    clients[0].push(np.ones(5))
    np.testing.assert_allclose(clients[0].pop_reply("float64")[1], 0.3)
    server.disconnect(clients[2].server_link, "test")
    before = centre(server).copy()
    clients[1].push(np.ones(5))
    np.testing.assert_allclose(clients[1].pop_reply("float64")[1], 0.45 * (1 - before))


# Asynchronous.


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
@settings(max_examples=25, deadline=None)
def test_asynchronous_elastic_is_its_formula(order: list[int]) -> None:
    server = Server(Policy("elastic", alpha=0.3))
    clients = make_clients(server, 4)
    models, c, alpha = [random_values(i) for i in range(4)], np.zeros(5, np.float32), np.float32(0.3)
    for i in order:
        clients[i].push(models[i])
        force = alpha * (models[i] - c)
        _, answer = clients[i].pop_reply()
        c = c + force
        models[i] = models[i] - answer
        np.testing.assert_array_equal(answer, force)
        np.testing.assert_array_equal(centre(server), c)
    assert server.shards[0].version == len(order) == sum(server.aggregator.staleness.values())


@pytest.mark.parametrize("fused", [False, True])
def test_async_with_one_client_is_serial_sgd(fused: bool) -> None:
    server = Server(Policy("async", max_staleness=3))
    (client,) = make_clients(server, 1, 40, options=[{"lr": 0.1, "momentum": 0.9, "fused": fused}])
    p = torch.zeros(40, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=fused)
    values = np.zeros(40, np.float32)
    for step in range(6):
        gradient = values * 2 - random_values(step, 40)
        p.grad = 2 * p.detach() - torch.from_numpy(random_values(step, 40))
        optimizer.step()
        client.push(gradient)
        values = client.pop_reply()[1]
        np.testing.assert_array_equal(values, p.detach().numpy())
    assert server.aggregator.staleness == {0: 6}


def test_push_without_pull_gets_a_reply_without_values() -> None:
    server = Server(Policy("async"))
    (client,) = make_clients(server, 1)
    client.send(Header(MessageType.PUSH, push_number=1, weight=1.0), np.ones(20, np.uint8))
    header, values = client.pop_reply()
    assert (header.status, header.push_number, values.size) == (ReplyStatus.OK, 1, 0)
    assert server.shards[0].version == 1
