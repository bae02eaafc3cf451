"""Admission of clients, and the reasons of refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Header, MessageType
from tests.support.protocol_clients import (
    ONES,
    ScriptedClient,
    assert_still_serves,
    json_body,
    make_client,
    make_contract,
    pair,
)


def test_client_is_admitted_with_its_shards() -> None:
    server = Server(Policy("async", lease=3.0))
    assert make_client(server).admitted
    assert list(server.sessions) == ["g0"] and set(server.shards) == {0, 1}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mode": "sync"}, "mode differs: expected async, got sync"),
        ({"servers": 2}, "servers differs"),
        ({"hpcsgd": "0.0"}, "hpcsgd differs: expected 1.0, got 0.0"),
        ({"optimizer": "Adam"}, "optimizer differs: expected SGD, got Adam"),
        ({"list of parameters": ["w 3x4", "b 5"]}, "b 4 at position 1, got b 5 at position 1"),
        ({"hpcsgd": "9" * 10_000}, "hpcsgd differs: expected 1.0, got 99999"),
    ],
)
def test_contract_mismatch_is_named(change: dict[str, Any], named: str) -> None:
    server = Server(Policy("async"))
    contract = make_contract([4], hpcsgd="1.0", **{"list of parameters": ["w 3x4", "b 4"]})
    first = ScriptedClient(server, "a", contract)
    assert first.admitted
    other = ScriptedClient(server, "b", {**contract, **change})
    assert not other.admitted and named in other.refusal and len(other.refusal) < 2000
    assert list(server.sessions) == ["a"]
    assert ScriptedClient(server, "c", contract).admitted


SHARDS: list[Any] = [
    None, 3, "abc", [3], [["float32", 4]], [["int32", 4, [[0, 4, 0]]]], [["nn", 4, [[0, 4, 0]]]],
    [["Tensor", 4, [[0, 4, 0]]]], [[None, 4, [[0, 4, 0]]]], [[["float32"], 4, [[0, 4, 0]]]],
    [["float32", -4, [[0, 4, 0]]]], [["float32", 0, []]], [["float32", 2**70, [[0, 4, 0]]]],
    [["float32", 4.5, [[0, 4, 0]]]], [["float32", math.inf, [[0, 4, 0]]]], [["float32", "4", [[0, 4, 0]]]],
    [["float32", 4, []]], [["float32", 4, [[0, 5, 0]]]], [["float32", 4, [[-1, 4, 0]]]],
    [["float32", 4, [[2, 1, 0]]]], [["float32", 4, [[0, 3, 0], [2, 4, 0]]]], [["float32", 4, [[0, 4, -1]]]],
    [["float32", 4, [[0, 4]]]], [["float32", 4, [[0, math.inf, 0]]]], [["float32", 4, 7]],
]  # fmt: skip


@pytest.mark.parametrize("shards", SHARDS, ids=repr)
def test_invalid_model_description_is_refused_and_has_no_effect(shards: Any) -> None:
    server = Server(Policy("async"))
    contract = make_contract([4])
    stranger = ScriptedClient(server, "a", {**contract, "shards": shards})
    assert not stranger.admitted and "no valid description of the model" in stranger.refusal
    assert make_client(server).admitted


@pytest.mark.parametrize("optimizer", ["LBFGS", "Optimizer", "lr_scheduler", 3, ["SGD"], None])
def test_other_optimizers_are_refused(optimizer: Any) -> None:
    server = Server(Policy("sync"))
    stranger = ScriptedClient(server, "a", make_contract([4], "sync", optimizer=optimizer))
    assert not stranger.admitted and "no valid description of the model" in stranger.refusal


@pytest.mark.parametrize(
    "hello",
    [
        *({"client": name} for name in (3, "", "\ud800", "a\x1b[2J", "a" * 10_000)),
        *({"talkers": count} for count in (0, -1, math.inf, "2")),
        *({"talker": which} for which in (1, -1, "0", None)),
        {"options": None},
        {"options": {}},
        {"contract": 3},
    ],
    ids=lambda hello: repr(hello)[:40],
)
def test_hello_without_a_valid_identity_is_refused(hello: dict[str, Any]) -> None:
    server = Server(Policy("async"))
    stranger = make_client(server, hello=hello)
    assert not stranger.admitted and "hello" in stranger.refusal
    assert not server.sessions and make_client(server).admitted


BAD_OPTIONS: list[Any] = [[], [3], [{}, None], [{"lr": -1}], [{"lr": "x"}], [{"speed": 1}]]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=repr)
def test_options_that_the_optimizer_rejects_are_refused(options: Any) -> None:
    server = Server(Policy("async"))
    contract = {**make_contract([4]), "shards": [["float32", 4, [[0, 2, 0], [2, 4, 1]]]]}
    good = [{"lr": 0.1}, {"lr": 0.2}]
    stranger = ScriptedClient(server, "a", contract, options)
    assert not stranger.admitted and "rejects these options" in stranger.refusal
    client = ScriptedClient(server, "b", contract, good)
    client.initialize(0 * ONES)
    client.send(Header(MessageType.OPTIONS), json_body({"options": [{"lr": 1.0}, {"lr": 0.5}]}))
    client.push(ONES)
    np.testing.assert_allclose(client.pop_reply()[1], [-1, -1, -0.5, -0.5])
    client.send(Header(MessageType.OPTIONS), json_body({"options": options}))
    assert not client.admitted and "options" in client.refusal


def test_new_connection_replaces_the_old_one() -> None:
    server, one, _two = pair(Policy("async"))
    old = one.server_link
    one.connect()
    assert one.admitted and old.closed and old not in server.links
    assert list(server.sessions) == ["g0", "g1"]
    server.pump([old])  # as if both were readable in the same poll
    assert one.admitted
    assert_still_serves(server, one)


def test_shards_are_distributed_to_servers_and_gateways() -> None:
    sizes = [4] * 12
    for index in range(2):
        server = Server(Policy("elastic"), index, 2)
        contract = {**make_contract(sizes, "elastic"), "servers": 2}
        clients = [
            ScriptedClient(server, f"g.{i}", contract, hello={"talker": i, "talkers": 3}) for i in range(3)
        ]
        assert set(server.shards) == set(range(index, 12, 2))
        parts = [server.sessions[each.name].shards for each in clients]
        assert sorted(i for part in parts for i in part) == sorted(server.shards)
        assert {len(part) for part in parts} == {2}
        other = next(iter(parts[1]))
        clients[0].send(Header(MessageType.PULL, other))
        assert not clients[0].admitted and "not its own" in clients[0].refusal


def test_client_that_reconnects_with_fewer_shards_is_not_awaited_at_the_others() -> None:
    server, one, two = pair(Policy("sync"))
    server.start_steps(None)
    two.hello.update(talker=1, talkers=2)
    two.connect()
    two.send(Header(MessageType.HEARTBEAT))
    assert_still_serves(server, one)
