"""Pushes of mode sync whose codes are summed: weights, residuals, clients that leave or join during a sum."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpcsgd.compress import build
from hpcsgd.server import Policy, Server
from hpcsgd.server.code_sum import CodeSumServer
from hpcsgd.server.connection import Request
from hpcsgd.server.delta_coding import shard_codec
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from tests.support.coding_clients import (
    SIZE,
    SPECS,
    CodingClient,
    bits,
    centre,
    exchange_all,
    make_clients,
    mean_of,
    random_values,
    residual_of,
)


@pytest.mark.parametrize("spec", SPECS)
def test_sync_clients_have_equal_bits(spec: str) -> None:
    server = Server(Policy("sync"))
    clients = make_clients(server, 3, spec)
    for step in range(5):
        for i, client in enumerate(clients):
            client.push_values(random_values(10 * step + i))
        exchange_all(clients)
        assert len({bits(client.model) for client in clients}) == 1


def test_sum_is_weighted_by_gradients_and_residuals_hold_the_rest() -> None:
    server = Server(Policy("sync"))
    clients = make_clients(server, 3, "ef+maxnorm:bits=3", "float64")
    gradients, weights = [random_values(i, np.float64) for i in range(3)], [3.0, 1.0, 2.0]
    for client, gradient, weight in zip(clients, gradients, weights, strict=True):
        client.push_values(gradient, weight)
    exchange_all(clients)
    applied = sum(w * g for w, g in zip(weights, gradients, strict=True)) - sum(map(residual_of, clients))
    np.testing.assert_allclose(mean_of(server), applied / 6, rtol=0, atol=1e-5)
    assert float(np.abs(residual_of(clients[0])).max()) > 0.1


def test_push_of_weight_0_adds_nothing() -> None:
    server = Server(Policy("sync"))
    clients = make_clients(server, 3, "ef+topk:ratio=0.05", "float64")
    bad = np.full(SIZE, np.nan)
    for weights in ([1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        before = server.shards[0].version
        for i, (client, weight) in enumerate(zip(clients, weights, strict=True)):
            client.push_values(random_values(i, np.float64) if weight else bad, weight)
        exchange_all(clients)
        assert server.shards[0].version == before + 1
        assert all(client.replies[-1][0] is ReplyStatus.OK for client in clients)
        assert len({bits(client.model) for client in clients}) == 1
    total = (
        random_values(0, np.float64)
        + random_values(2, np.float64)
        - residual_of(clients[0])
        - residual_of(clients[2])
    )
    wanted = total / 2 + random_values(1, np.float64) - residual_of(clients[1])
    np.testing.assert_allclose(mean_of(server), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["disconnect", "silence"])
def test_client_lost_during_a_sum_is_excluded_from_it(how: str) -> None:
    server = Server(Policy("sync"))
    one, two = make_clients(server, 2, "ef+maxnorm:bits=3", "float64")
    for client in (one, two):
        client.push_values(random_values(1, np.float64))
    for client in (one, two):
        client.receive_replies(1)  # RESTART, as one of two clients
    one.receive_replies()  # the combination, and sends the next part
    assert one.request is not None and one.request.header.part == 1
    if how == "disconnect":
        two.disconnect()
    else:
        two.server_link.last_received = -math.inf
        server.check_leases()
    one.receive_replies()
    assert one.request is None and one.replies[-1][0] is ReplyStatus.OK
    np.testing.assert_allclose(
        mean_of(server), random_values(1, np.float64) - residual_of(one), rtol=0, atol=1e-5
    )
    if how == "disconnect":
        two.reconnect()
    exchange_all([two])
    assert two.replies[-1] == (ReplyStatus.LATE, two.dense_bytes) and not residual_of(two).any()
    for client in (one, two):
        client.push_values(random_values(2, np.float64))
    exchange_all([one, two])
    assert two.replies[-1][0] is ReplyStatus.OK


def test_client_that_reconnects_before_the_next_part_stays_in_the_sum() -> None:
    server = Server(Policy("sync"))
    clients = make_clients(server, 3, "ef+maxnorm", "float64")
    for client in clients:
        client.push_values(random_values(1, np.float64))
    for _ in range(2):
        for client in clients[:2]:
            client.receive_replies(1)
        clients[0].disconnect()
        clients[0].reconnect()
    exchange_all(clients)
    assert server.shards[0].version == 1 and server.aggregator.dropped == 0


def test_sum_without_members_is_discarded_and_restarted() -> None:
    server = Server(Policy("sync"))
    (client,) = make_clients(server, 1, "ef+maxnorm", "float64")
    for seed in range(3):
        client.push_values(random_values(seed, np.float64))
        client.disconnect()
        assert server.shards[0].version == seed
        client.reconnect()
        client.receive_replies(1)  # it has sent its last part, and the reply is lost
        client.disconnect()
        client.reconnect()
        exchange_all([client])
        assert client.replies[-1] == (ReplyStatus.OK, client.dense_bytes)
    np.testing.assert_allclose(
        mean_of(server),
        sum(random_values(i, np.float64) for i in range(3)) - residual_of(client),
        rtol=0,
        atol=1e-5,
    )


def test_client_that_joins_during_a_sum_is_not_awaited() -> None:
    server = Server(Policy("sync"))
    one, two = make_clients(server, 2, "ef+maxnorm", "float64")
    two.send(Header(MessageType.PAUSE))
    one.push_values(random_values(1, np.float64))
    two.push_values(random_values(2, np.float64))
    one.receive_replies()
    one.receive_replies()
    assert one.replies[-1][0] is ReplyStatus.OK
    exchange_all([two])
    assert two.replies == [(ReplyStatus.LATE, two.dense_bytes)] and bits(two.model) == bits(centre(server))
    two.send(Header(MessageType.PAUSE))
    one.push_values(random_values(2, np.float64))
    two.send(Header(MessageType.PULL, steps=1))  # it joins, but has not pulled its values yet
    two.received.clear()
    one.receive_replies()
    one.receive_replies()
    assert one.request is None
    two.pull_model()
    for client in (one, two):
        client.push_values(random_values(3, np.float64))
    exchange_all([one, two])
    assert server.shards[0].version == 3 and two.replies[-1][0] is ReplyStatus.OK


def test_parts_of_a_sum_are_validated() -> None:
    server = Server(Policy("sync"))
    one, two = make_clients(server, 2, "ef+maxnorm")
    whole = np.zeros(one.dense_bytes, np.uint8)
    first = np.zeros(
        one.codec.encode_push(Request(Header(MessageType.PUSH, weight=1.0)), one.model).header.nbytes,
        np.uint8,
    )
    push = Header(MessageType.PUSHPULL, push_number=1, weight=1.0)
    for part, terms, body in ((0, 99, whole), (0, 0, first), (1, 1, np.zeros(208, np.uint8))):
        two.send(replace(push, part=part, terms=terms), body)  # too many clients, or not the next part
        assert two.admitted, (two.refusal, part)
        header, _ = two.received.pop()
        assert (header.status, header.terms, header.nbytes) == (ReplyStatus.RESTART, 2, 0)
    for part, weight, body in ((0, 1.0, whole), (9, 1.0, first), (0, 0.0, first), (0, 1.0, first[:-1])):
        other = CodingClient(server, f"x{part}{weight}{body.size}", "ef+maxnorm")
        other.send(replace(push, weight=weight, part=part, terms=1), body)
        assert not other.admitted, (part, weight, body.size)
    two.push_numbers[0] = 1
    for client in (one, two):
        client.push_values(random_values(1))
    two.receive_replies(1)
    one.receive_replies(1)  # both have restarted as one of two, and sent their first parts
    two.receive()
    assert two.received.pop()[0].status is ReplyStatus.CONTINUE
    alone = CodeSumServer(
        shard_codec(build("ef+maxnorm"), torch.float32, SIZE, SIZE, [(0, 200), (200, 400)])
    ).part_sizes(1)
    two.send(
        replace(push, push_number=2, part=1, terms=1), np.zeros(alone[1], np.uint8)
    )  # with the terms of another sum
    assert two.received.pop()[0].status is ReplyStatus.RESTART
    two.send(Header(MessageType.PAUSE))
    exchange_all([one])
    assert one.replies == [(ReplyStatus.OK, one.dense_bytes)]
