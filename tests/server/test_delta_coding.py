"""Delta coding between clients and a server: equal bits on both sides and no lost updates."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server import Policy, Server, update_log
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from tests.support.coding_clients import (
    SIZE,
    SPECS,
    CodingClient,
    bits,
    centre,
    exchange_all,
    make_clients,
    random_values,
    reference_of,
    residual_of,
)

ACTS = ("push", "push", "push", "receive", "receive", "disconnect", "reconnect", "silence")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", SPECS)
def test_client_holds_the_server_s_reference_and_only_the_first_reply_is_dense(spec: str, dtype: str) -> None:
    """With the gradient of a quadratic function, server and client converge to its minimum."""
    server, best = Server(Policy("async")), torch.from_numpy(random_values(1, dtype))
    (client,) = make_clients(server, 1, spec, dtype)
    for _ in range(120):
        client.push_values((client.model - best).numpy())
        client.receive_replies()
        on_server = reference_of(server, client.name)
        assert on_server is not None and bits(on_server) == bits(client.model)
    sizes = [size for _, size in client.replies]
    assert sizes == [client.dense_bytes] + [client.codec.reply_bytes] * 119
    assert client.codec.reply_bytes < client.dense_bytes
    for values in (centre(server), client.model):
        assert float((values - best).norm()) < 0.1 * float(best.norm())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("together", [False, True])
def test_elastic_conserves_the_sum_of_all_models(spec: str, together: bool) -> None:
    server = Server(Policy("elastic", 0.3, 0 if together else None))
    clients = make_clients(server, 3, spec, "float64")
    for i, client in enumerate(clients):
        client.model += torch.from_numpy(random_values(i, np.float64))
    total = sum(client.model for client in clients) + centre(server)
    spread = [float((client.model - total / 4).norm()) for client in clients]
    for _ in range(60):
        for client in clients:
            client.push_values()
        for client in clients:
            client.receive_replies()
            assert client.request is None
            on_server = reference_of(server, client.name)
            pushed = client.codec.state_dict()["told"]
            assert on_server is not None and pushed is not None and bits(on_server) == bits(pushed)
        torch.testing.assert_close(sum(c.model for c in clients) + centre(server), total, rtol=0, atol=1e-12)
    for client, before in zip(clients, spread, strict=True):
        assert float((client.model - total / 4).norm()) < 0.3 * before
        assert client.replies[-1][1] == client.codec.reply_bytes


@pytest.mark.parametrize("mode", ["sync", "async", "bounded", "elastic"])
@pytest.mark.parametrize("spec", ["ef+maxnorm", "ef+topk:ratio=0.05"])
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 2)), min_size=10, max_size=60))
@settings(max_examples=25, deadline=None)
def test_references_are_equal_on_both_sides_after_any_failures(
    mode: str, spec: str, acts: list[tuple[str, int]]
) -> None:
    policy = Policy("async", None, 1) if mode == "bounded" else Policy(mode, 0.25)
    sums: list[np.ndarray] = []

    def record(shard: Any, pushes: list[Any], terms: Any) -> None:
        if terms.weights:
            assert terms.weights == [terms.weights[0]] + [0.0] * (len(pushes) - 1) or mode != "sync"
            sums.append(terms.weights[0] * pushes[0].values.view(np.float64))

    server, given = Server(policy, record=record), np.zeros(SIZE)
    clients = make_clients(server, 3, spec, "float64")
    if mode == "elastic":
        for i, client in enumerate(clients):
            client.model += torch.from_numpy(random_values(i, np.float64))
    total = sum(client.model for client in clients) + centre(server)

    def act(what: str, client: CodingClient, number: int) -> None:
        if what == "push" and client.request is None and client.admitted:
            client.push_values(None if mode == "elastic" else random_values(number, np.float64))
        elif what == "receive":
            answers = len(client.replies)
            client.receive_replies()
            if len(client.replies) > answers and client.replies[-1][0] is ReplyStatus.OK:
                given[:] += client.pushed.numpy()
        elif what == "disconnect" and client.admitted:
            client.disconnect()
        elif what == "reconnect" and not client.admitted:
            client.reconnect()
        elif what == "silence" and client.admitted:
            client.server_link.last_received = -math.inf
            server.check_leases()
        on_server = reference_of(server, client.name)
        on_client = client.codec.state_dict()["told"]
        if client.admitted and client.request is None and on_server is not None:
            assert on_client is not None and bits(on_server) == bits(on_client)
            if mode != "elastic":
                assert bits(on_client) == bits(client.model)

    for number, (what, i) in enumerate(acts):
        act(what, clients[i], number)
    for _ in range(12):  # enough for all parts of a push, even if it is restarted
        for client in clients:
            for what in ("reconnect", "receive"):
                act(what, client, 0)
            if client.request is None and client.admitted:
                client.send(Header(MessageType.PAUSE))
                client.received.clear()
    assert all(client.request is None for client in clients)
    if mode == "elastic":
        torch.testing.assert_close(sum(c.model for c in clients) + centre(server), total, rtol=0, atol=1e-12)
    assert server.links
    if mode == "sync":  # applied pushes only: late ones leave no residual
        np.testing.assert_allclose(
            sum(sums, np.zeros(SIZE)) + sum(map(residual_of, clients)), given, atol=1e-4
        )


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_reply_is_dense_after_a_reconnect_and_for_a_late_push(mode: str) -> None:
    server = Server(Policy(mode, max_staleness=None if mode == "sync" else 1))
    one, two = make_clients(server, 2, "ef+maxnorm")

    def step(seed: int) -> None:
        for i, client in enumerate((one, two)):
            client.push_values(random_values(2 * seed + i))
        exchange_all([one, two])

    for seed in range(3):
        step(seed)
    two.disconnect()
    for seed in range(5):
        one.push_values(random_values(seed))
        exchange_all([one])
    two.reconnect()
    two.push_values(random_values(4))  # a gradient at old values
    exchange_all([two])
    assert two.replies[-1] == (ReplyStatus.LATE, two.dense_bytes) and bits(two.model) == bits(centre(server))
    step(5)
    two.server_link.last_received = -math.inf
    server.check_leases()
    for seed in range(5):
        one.push_values(random_values(seed))
        exchange_all([one])
    two.push_values(random_values(8))  # over the same link
    exchange_all([two])
    assert two.replies[-1] == (ReplyStatus.LATE, two.dense_bytes)
    step(9)
    coded = one.codec.reply_bytes
    assert one.replies == [(ReplyStatus.OK, one.dense_bytes)] + [(ReplyStatus.OK, coded)] * 14
    assert two.replies[-1] == (ReplyStatus.OK, coded)


@pytest.mark.parametrize("mode", ["sync", "async", "elastic"])
@pytest.mark.parametrize("spec", SPECS)
def test_replayed_log_gives_the_same_bits_and_replies(tmp_path: Path, mode: str, spec: str) -> None:
    policy, log = Policy(mode, 0.3), update_log.UpdateLog(tmp_path)
    server = Server(policy, record=log.record_update)
    log.start(server, 0)
    clients = make_clients(server, 2, spec)
    for step in range(6):
        for i, client in enumerate(clients):
            client.model += torch.from_numpy(random_values(i)) * (mode == "elastic")
            client.push_values(None if mode == "elastic" else random_values(10 * step + i))
        exchange_all(clients)
    last = clients[0].replies[-1], clients[0].difference.clone()
    log.record_sessions()
    again = Server(policy)
    update_log.UpdateLog(tmp_path).replay(again, 0)
    assert bits(centre(again)) == bits(centre(server))
    assert again.shards[0].version == server.shards[0].version
    # A repeated push, whose reply was lost, gets the same reply.
    client = clients[0]
    client.server = again
    client.connect()
    assert client.admitted
    header = Header(MessageType.PUSHPULL, push_number=6, weight=1.0, nbytes=client.dense_bytes)
    client.link.send(header, np.zeros(client.dense_bytes, np.uint8))
    client.deliver()
    client.receive()
    header, body = client.received.pop()
    assert last[0][0] is header.status is ReplyStatus.OK
    if mode == "elastic":
        difference = torch.empty(SIZE)
        if header.nbytes == client.codec.reply_bytes:
            client.codec.reply_buffer[:] = body
            client.codec.decode_reply(header, difference)
        else:
            difference.view(torch.uint8).numpy()[:] = body
        assert bits(difference) == bits(last[1])
    else:
        expected = client.model if mode == "sync" else reference_of(again, client.name)
        assert expected is not None
        assert header.nbytes == client.dense_bytes and body.tobytes() == bits(expected)


@pytest.mark.parametrize("lost", ["reply", "push"])
@pytest.mark.parametrize("saved", [0, 3, 6])
@pytest.mark.parametrize("spec", SPECS)
def test_sync_clients_of_a_killed_server_continue_with_the_same_bits(
    tmp_path: Path, spec: str, saved: int, lost: str
) -> None:
    """The server is killed in step 6, after the last state was saved in step `saved`."""

    def train(folder: Path, killed_in: int) -> list[bytes]:
        policy, log = Policy("sync"), update_log.UpdateLog(folder)
        server = Server(policy, record=log.record_update)
        log.start(server, 0)
        clients = make_clients(server, 2, spec)
        state: dict[str, Any] | None = None
        for step in range(9):
            if step == saved and saved:
                state = update_log.server_state(server)
                log.start(server, saved)
            for i, client in enumerate(clients):
                if step == killed_in and lost == "push":
                    client.link.close()
                client.push_values(random_values(10 * step + i))
            if step == killed_in:
                server = restart(server, clients, state, folder)
            exchange_all(clients)
        return [bits(client.model) for client in clients] + [bits(centre(server))]

    def restart(
        server: Server, clients: list[CodingClient], state: dict[str, Any] | None, folder: Path
    ) -> Server:
        if lost == "reply":  # the update is made, and nobody learns of it
            for _ in range(8):
                if server.shards[0].version == 7:
                    break
                for client in clients:
                    client.receive_replies(1)
            assert server.shards[0].version == 7
        again = Server(server.policy)
        if state is not None:
            update_log.restore_server(again, state)
        update_log.UpdateLog(folder).replay(again, saved)
        again.start_steps(None)
        for client in clients:
            client.received.clear()
            client.server = again
            client.reconnect()
        return again

    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    assert train(tmp_path / "killed", 6) == train(tmp_path / "undisturbed", -1)


@pytest.mark.parametrize("spec", SPECS)
def test_pauses_between_steps_change_no_bit(spec: str) -> None:
    """A loop that ends and begins again, at a time of its own, pulls the model that it trains."""

    def train(pauses: bool) -> list[bytes]:
        server = Server(Policy("sync"))
        clients = make_clients(server, 2, spec)
        for step in range(6):
            for number, client in enumerate(clients):
                client.push_values(random_values(7 * step + number))
            exchange_all(clients)
            if pauses and step % 2:
                for client in clients:
                    client.send(Header(MessageType.PAUSE))
                    client.pull_model(joins=True)
        return [bits(client.model) for client in clients] + [bits(centre(server))]

    assert train(pauses=True) == train(pauses=False)


def test_client_that_joins_behind_the_others_has_the_server_s_values() -> None:
    server = Server(Policy("sync"))
    one, other = make_clients(server, 2, "ef+maxnorm")
    for step in range(3):
        one.push_values(random_values(step))
        if step < 2:
            other.push_values(random_values(step))
            exchange_all([one, other])
        else:
            other.send(Header(MessageType.PAUSE))
            exchange_all([one])
    other.pull_model(joins=True)
    assert bits(other.model) == bits(centre(server)) != bits(one.model)
    for each in (one, other):
        each.push_values(random_values(9))
    exchange_all([one, other])
    for each in (one, other):
        reference = reference_of(server, each.name)
        assert reference is not None and bits(each.model) == bits(reference)


def test_first_connection_of_a_client_costs_no_dense_reply_after_a_checkpoint_is_loaded() -> None:
    """Whether its hello comes before the first values of a shard, or after: a matter of chance."""
    server = Server(Policy("sync"))
    clients = [*make_clients(server, 1, "ef+maxnorm"), CodingClient(server, "late", "ef+maxnorm")]
    clients[-1].pull_model()
    server.start_steps(None)
    codec, reference = server.shards[0].codec, torch.zeros(SIZE)
    assert codec is not None
    codec.load_state_dict({client.name: reference for client in clients})
    for client in clients:
        client.codec.load_state_dict({**client.codec.state_dict(), "told": reference}, with_reference=True)
        client.push_values(random_values(2))
    exchange_all(clients)
    expected = (ReplyStatus.OK, clients[0].codec.reply_bytes)
    assert [client.replies for client in clients] == [[expected]] * 2


def test_push_without_a_reference_on_the_server_is_repeated_dense() -> None:
    server = Server(Policy("elastic", 0.3))
    (client,) = make_clients(server, 1, "ef+maxnorm")
    client.model += 1
    client.push_values()
    client.receive_replies()
    client.disconnect()
    client.connect()
    client.push_values()
    assert client.request is not None and client.request.header.nbytes == client.codec.push_bytes
    client.receive_replies()
    assert client.request is None and server.shards[0].version == 2
    on_server, on_client = reference_of(server, client.name), client.codec.state_dict()["told"]
    assert on_server is not None and on_client is not None and bits(on_server) == bits(on_client)
    torch.testing.assert_close(client.model + centre(server), torch.ones(SIZE))


@pytest.mark.parametrize("mode", ["async", "elastic"])
def test_values_that_are_not_finite_are_sent_dense(mode: str) -> None:
    server = Server(Policy(mode, 0.3))
    (client,) = make_clients(server, 1, "ef+maxnorm")
    bad = np.full(SIZE, np.inf, np.float32)
    for values in (random_values(1), bad, random_values(2), random_values(3)):
        if mode == "elastic":
            client.model.copy_(torch.from_numpy(values))
        client.push_values(None if mode == "elastic" else values)
        client.receive_replies()
    assert client.request is None and client.admitted
    assert not bool(centre(server).isfinite().any())
    assert client.replies[-1] == (ReplyStatus.OK, client.dense_bytes)
