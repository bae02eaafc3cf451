"""Who is let in, and what it is told if not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Head, Kind
from tests.support.protocol_clients import ONES, Talker, as_bytes, contract_of, goes_on, pair, talker


def test_who_knows_the_secret_is_let_in_and_told_that_the_server_knows_it() -> None:
    server = Server(Policy("async", secret="s", lease=3.0))
    assert talker(server, secret="s").let_in
    assert list(server.clients) == ["g0"] and set(server.shards) == {0, 1}


@pytest.mark.parametrize("proof", ["", "0" * 64, None, 3, ["x"], "\ud800", "é"])
def test_who_does_not_is_refused(proof: object) -> None:
    server = Server(Policy("async", secret="s"))
    stranger = talker(server, hello={"proof": proof})
    assert not stranger.let_in and "secret" in stranger.reason and stranger.lost
    assert not server.clients and not server.links and not server.contract
    assert talker(server, secret="s").let_in


def test_a_nonce_that_no_text_can_be_made_of_is_only_a_nonce() -> None:
    server = Server(Policy("async"))
    talker(server, hello={"nonce": "\ud800"})
    assert list(server.clients) == ["g0"]


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
def test_what_differs_is_named(change: dict[str, Any], named: str) -> None:
    server = Server(Policy("async"))
    contract = contract_of([4], hpcsgd="1.0", **{"list of parameters": ["w 3x4", "b 4"]})
    first = Talker(server, "a", contract)
    assert first.let_in
    other = Talker(server, "b", {**contract, **change})
    assert not other.let_in and named in other.reason and len(other.reason) < 2000
    assert list(server.clients) == ["a"]
    assert Talker(server, "c", contract).let_in


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
def test_what_describes_no_model_is_refused_and_binds_nobody(shards: Any) -> None:
    server = Server(Policy("async"))
    contract = contract_of([4])
    stranger = Talker(server, "a", {**contract, "shards": shards})
    assert not stranger.let_in and "describes no model" in stranger.reason
    assert talker(server).let_in


@pytest.mark.parametrize("optimizer", ["LBFGS", "Optimizer", "lr_scheduler", 3, ["SGD"], None])
def test_other_optimizers_are_refused(optimizer: Any) -> None:
    server = Server(Policy("sync"))
    stranger = Talker(server, "a", contract_of([4], "sync", optimizer=optimizer))
    assert not stranger.let_in and "describes no model" in stranger.reason


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
def test_a_hello_that_says_nothing_is_refused(hello: dict[str, Any]) -> None:
    server = Server(Policy("async"))
    stranger = talker(server, hello=hello)
    assert not stranger.let_in and "hello" in stranger.reason
    assert not server.clients and talker(server).let_in


BAD_OPTIONS: list[Any] = [[], [3], [{}, None], [{"lr": -1}], [{"lr": "x"}], [{"speed": 1}]]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=repr)
def test_options_that_the_optimizer_refuses_are_refused(options: Any) -> None:
    server = Server(Policy("async"))
    contract = {**contract_of([4]), "shards": [["float32", 4, [[0, 2, 0], [2, 4, 1]]]]}
    good = [{"lr": 0.1}, {"lr": 0.2}]
    stranger = Talker(server, "a", contract, options)
    assert not stranger.let_in and "does not take these options" in stranger.reason
    client = Talker(server, "b", contract, good)
    client.fill(0 * ONES)
    client.say(Head(Kind.OPTIONS), as_bytes({"options": [{"lr": 1.0}, {"lr": 0.5}]}))
    client.push(ONES)
    np.testing.assert_allclose(client.answer()[1], [-1, -1, -0.5, -0.5])
    client.say(Head(Kind.OPTIONS), as_bytes({"options": options}))
    assert not client.let_in and "options" in client.reason


def test_who_connects_anew_takes_the_place_of_itself() -> None:
    server, one, _two = pair(Policy("async"))
    old = one.far
    one.connect()
    assert one.let_in and old.closed and old not in server.links
    assert list(server.clients) == ["g0", "g1"]
    server.pump([old])  # as where both had something in the same round
    assert one.let_in
    goes_on(server, one)


def test_shards_are_dealt_to_servers_and_talkers() -> None:
    sizes = [4] * 12
    for index in range(2):
        server = Server(Policy("elastic"), index, 2)
        contract = {**contract_of(sizes, "elastic"), "servers": 2}
        talkers = [Talker(server, f"g.{i}", contract, hello={"talker": i, "talkers": 3}) for i in range(3)]
        assert set(server.shards) == set(range(index, 12, 2))
        parts = [server.clients[each.name].shards for each in talkers]
        assert sorted(i for part in parts for i in part) == sorted(server.shards)
        assert {len(part) for part in parts} == {2}
        other = next(iter(parts[1]))
        talkers[0].say(Head(Kind.PULL, other))
        assert not talkers[0].let_in and "not its own" in talkers[0].reason


def test_who_comes_back_with_fewer_shards_is_not_waited_for_at_the_others() -> None:
    server, one, two = pair(Policy("sync"))
    server.begin(None)
    two.hello.update(talker=1, talkers=2)
    two.connect()
    two.say(Head(Kind.BEAT))
    goes_on(server, one)
