"""Codes between clients and a server: both have the same bits, and nothing is lost, whatever breaks."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.compress import build
from hpcsgd.compress.point_to_point import bytes_of
from hpcsgd.server import Policy, Server, update_log
from hpcsgd.server.code_sum import ServerSum
from hpcsgd.server.connection import Request
from hpcsgd.server.delta_coding import ClientCodes, Coding, coder_of
from hpcsgd.server.protocol import Head, Kind, State
from tests.support.protocol_clients import Talker, contract_of

SIZE = 400
SPECS = [
    "bf16",
    "ef+maxnorm:scale=tensor",
    "ef+hadamard+maxnorm:bits=3",
    "randk:ratio=0.3",
    "ef+topk:ratio=0.05",
]


def contract_with(spec: str, mode: str, sizes: list[int], dtype: str = "float32") -> dict[str, Any]:
    tensors = [[[0, size // 2], [size // 2, size]] for size in sizes]
    return contract_of(sizes, mode, dtype, compress={"scheme": spec, "tensors": tensors})


def drawn(seed: int, dtype: Any = np.float32, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


class Coded(Talker):
    """A client that talks in codes, as a group does; its model is what it was answered."""

    def __init__(self, server: Server, name: str, spec: str, dtype: str = "float32", lr: float = 0.1) -> None:
        mode = server.policy.mode
        super().__init__(server, name, contract_with(spec, mode, [SIZE], dtype), [{"lr": lr}])
        compressor = build(spec)
        assert compressor is not None
        self.elastic = mode == "elastic"
        coding = Coding(compressor, mode, sum(name.encode()))
        tensors = [(0, SIZE // 2), (SIZE // 2, SIZE)]
        coder = coder_of(compressor, getattr(torch, dtype), SIZE, SIZE, tensors)
        assert coder is not None
        self.codes = ClientCodes(coder, 0, coding)
        self.model = torch.zeros(SIZE, dtype=coder.dtype)
        self.pull = torch.zeros(SIZE, dtype=coder.dtype)
        self.asked: Request | None = None
        self.answered: list[tuple[State, int]] = []

    @property
    def dense(self) -> int:
        return self.model.nbytes

    def start(self, values: np.ndarray | None = None) -> None:
        if values is not None:
            self.fill(values)
        self.model.copy_(torch.from_numpy(self.fetch(0, values.dtype if values is not None else None).copy()))

    def fetch(self, shard: int = 0, dtype: Any = None) -> np.ndarray:
        return super().fetch(shard, dtype or self.model.numpy().dtype)

    def give(self, gradient: np.ndarray | None = None, weight: float = 1.0) -> None:
        """Push a gradient, or the model; the answer is heard when it comes."""
        self.rounds[0] = number = self.rounds.get(0, 0) + 1
        self.pushed = self.model.clone() if gradient is None else torch.from_numpy(gradient)
        version = self.versions.get(0, 0)
        head = Head(Kind.PUSHPULL, round=number, version=version, weight=weight, nbytes=self.dense)
        self.asked = self.codes.begin(Request(head, bytes_of(self.pushed)), self.pushed)
        self.ask()

    def ask(self) -> None:
        """Say it, once more maybe."""
        assert self.asked is not None
        self.link.send(self.asked.head, self.asked.source)
        self.deliver()

    def hear(self, messages: int = 10) -> None:
        """Take the answer, if there is one; or so many messages of it."""
        self.listen()
        for _ in range(messages):
            if not self.heard:
                break
            head, body = self.heard.pop(0)
            assert self.asked is not None and head.round == self.asked.head.round
            target, coded = self.pull if self.elastic else self.model, self.asked.coded
            if coded is not None and head.nbytes == coded.nbytes:
                coded[:] = body
            elif head.nbytes:
                bytes_of(target)[:] = body
            self.asked.answer = head
            following = self.codes.follow(self.asked)
            if following is not None:
                self.asked = following
                self.ask()
                self.listen()
                continue
            self.answered.append((head.state, head.nbytes))
            self.codes.hear(head, target)
            if self.elastic:
                self.model -= self.pull
            self.asked = None

    def break_off(self) -> None:
        self.heard.clear()
        self.link.close()
        self.deliver()

    def come_back(self) -> None:
        self.connect()
        if self.asked is not None:
            self.ask()


def group(server: Server, count: int, spec: str, dtype: str = "float32") -> list[Coded]:
    found = [Coded(server, f"g{i}", spec, dtype) for i in range(count)]
    found[0].start(np.zeros(SIZE, dtype))
    for client in found[1:]:
        client.start()
    server.begin(None)
    return found


def hear_all(clients: list[Coded]) -> None:
    """Let all go on until all have their answers."""
    for _ in range(8):
        for client in clients:
            client.hear()
    assert all(client.asked is None for client in clients)


def centre(server: Server) -> torch.Tensor:
    values = server.shards[0].centre
    assert values is not None
    return values


def told(server: Server, client: str) -> torch.Tensor | None:
    codes = server.shards[0].codes
    assert codes is not None
    return codes.state_dict().get(client)


def bits(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_client_follows_the_values_and_only_the_first_answer_is_not_a_code(spec: str, dtype: str) -> None:
    """Its gradient leads to a minimum, which the server comes to, and the client with it."""
    server, best = Server(Policy("async")), torch.from_numpy(drawn(1, dtype))
    (client,) = group(server, 1, spec, dtype)
    for _ in range(120):
        client.give((client.model - best).numpy())
        client.hear()
        known = told(server, client.name)
        assert known is not None and bits(known) == bits(client.model)
    sizes = [size for _, size in client.answered]
    assert sizes == [client.dense] + [client.codes.answer_bytes] * 119
    assert client.codes.answer_bytes < client.dense
    for values in (centre(server), client.model):
        assert float((values - best).norm()) < 0.1 * float(best.norm())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("together", [False, True])
def test_elastic_keeps_the_sum_of_all_models(spec: str, together: bool) -> None:
    server = Server(Policy("elastic", 0.3, 0 if together else None))
    clients = group(server, 3, spec, "float64")
    for i, client in enumerate(clients):
        client.model += torch.from_numpy(drawn(i, np.float64))
    total = sum(client.model for client in clients) + centre(server)
    spread = [float((client.model - total / 4).norm()) for client in clients]
    for _ in range(60):
        for client in clients:
            client.give()
        for client in clients:
            client.hear()
            assert client.asked is None
            known = told(server, client.name)
            pushed = client.codes.state_dict()["told"]
            assert known is not None and pushed is not None and bits(known) == bits(pushed)
        torch.testing.assert_close(sum(c.model for c in clients) + centre(server), total, rtol=0, atol=1e-12)
    for client, before in zip(clients, spread, strict=True):
        assert float((client.model - total / 4).norm()) < 0.3 * before
        assert client.answered[-1][1] == client.codes.answer_bytes


ACTS = ("push", "push", "push", "hear", "hear", "drop", "return", "silence")


@pytest.mark.parametrize("mode", ["sync", "async", "bounded", "elastic"])
@pytest.mark.parametrize("spec", ["ef+maxnorm", "ef+topk:ratio=0.05"])
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 2)), min_size=10, max_size=60))
@settings(max_examples=25, deadline=None)
def test_whatever_breaks_both_sides_know_the_same(mode: str, spec: str, acts: list[tuple[str, int]]) -> None:
    policy = Policy("async", None, 1) if mode == "bounded" else Policy(mode, 0.25)
    sums: list[np.ndarray] = []

    def record(shard: Any, pushes: list[Any], terms: Any) -> None:
        if terms.weights:
            assert terms.weights == [terms.weights[0]] + [0.0] * (len(pushes) - 1) or mode != "sync"
            sums.append(terms.weights[0] * pushes[0].values.view(np.float64))

    server, given = Server(policy, record=record), np.zeros(SIZE)
    clients = group(server, 3, spec, "float64")
    if mode == "elastic":
        for i, client in enumerate(clients):
            client.model += torch.from_numpy(drawn(i, np.float64))
    total = sum(client.model for client in clients) + centre(server)

    def act(what: str, client: Coded, number: int) -> None:
        if what == "push" and client.asked is None and client.let_in:
            client.give(None if mode == "elastic" else drawn(number, np.float64))
        elif what == "hear":
            answers = len(client.answered)
            client.hear()
            if len(client.answered) > answers and client.answered[-1][0] is State.DONE:
                given[:] += client.pushed.numpy()
        elif what == "drop" and client.let_in:
            client.break_off()
        elif what == "return" and not client.let_in:
            client.come_back()
        elif what == "silence" and client.let_in:
            client.far.heard = -math.inf
            server.watch()
        known = told(server, client.name)
        mine = client.codes.state_dict()["told"]
        if client.let_in and client.asked is None and known is not None:
            assert mine is not None and bits(known) == bits(mine)
            if mode != "elastic":
                assert bits(mine) == bits(client.model)

    for number, (what, i) in enumerate(acts):
        act(what, clients[i], number)
    for _ in range(12):  # the parts of a push, from the beginning on maybe
        for client in clients:
            for what in ("return", "hear"):
                act(what, client, 0)
            if client.asked is None and client.let_in:
                client.say(Head(Kind.REST))
                client.heard.clear()
    assert all(client.asked is None for client in clients)
    if mode == "elastic":
        torch.testing.assert_close(sum(c.model for c in clients) + centre(server), total, rtol=0, atol=1e-12)
    assert server.links
    if mode == "sync":  # of all that was counted in; of what was late nothing is kept
        np.testing.assert_allclose(sum(sums, np.zeros(SIZE)) + sum(map(kept, clients)), given, atol=1e-4)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_after_a_break_and_when_it_was_late_a_client_is_told_the_values_themselves(mode: str) -> None:
    server = Server(Policy(mode, max_staleness=None if mode == "sync" else 1))
    one, two = group(server, 2, "ef+maxnorm")

    def step(seed: int) -> None:
        for i, client in enumerate((one, two)):
            client.give(drawn(2 * seed + i))
        hear_all([one, two])

    for seed in range(3):
        step(seed)
    two.break_off()
    for seed in range(5):
        one.give(drawn(seed))
        hear_all([one])
    two.come_back()
    two.give(drawn(4))  # without the new values
    hear_all([two])
    assert two.answered[-1] == (State.LATE, two.dense) and bits(two.model) == bits(centre(server))
    step(5)
    two.far.heard = -math.inf
    server.watch()
    for seed in range(5):
        one.give(drawn(seed))
        hear_all([one])
    two.give(drawn(8))  # over the same link
    hear_all([two])
    assert two.answered[-1] == (State.LATE, two.dense)
    step(9)
    coded = one.codes.answer_bytes
    assert one.answered == [(State.DONE, one.dense)] + [(State.DONE, coded)] * 14
    assert two.answered[-1] == (State.DONE, coded)


@pytest.mark.parametrize("spec", SPECS)
def test_who_is_in_step_in_sync_has_the_same_bits_as_the_others(spec: str) -> None:
    server = Server(Policy("sync"))
    clients = group(server, 3, spec)
    for step in range(5):
        for i, client in enumerate(clients):
            client.give(drawn(10 * step + i))
        hear_all(clients)
        assert len({bits(client.model) for client in clients}) == 1


@pytest.mark.parametrize("mode", ["sync", "async", "elastic"])
@pytest.mark.parametrize("spec", SPECS)
def test_a_log_makes_the_same_updates_again(tmp_path: Path, mode: str, spec: str) -> None:
    policy, kept = Policy(mode, 0.3), update_log.Keeping(tmp_path)
    server = Server(policy, record=kept.record)
    kept.begin(server, 0)
    clients = group(server, 2, spec)
    for step in range(6):
        for i, client in enumerate(clients):
            client.model += torch.from_numpy(drawn(i)) * (mode == "elastic")
            client.give(None if mode == "elastic" else drawn(10 * step + i))
        hear_all(clients)
    last = clients[0].answered[-1], clients[0].pull.clone()
    kept.note()
    again = Server(policy)
    update_log.Keeping(tmp_path).replay(again, 0)
    assert bits(centre(again)) == bits(centre(server))
    assert again.shards[0].version == server.shards[0].version
    # A push whose answer was lost is answered as it was.
    client = clients[0]
    client.server = again
    client.connect()
    assert client.let_in
    head = Head(Kind.PUSHPULL, round=6, weight=1.0, nbytes=client.dense)
    client.link.send(head, np.zeros(client.dense, np.uint8))
    client.deliver()
    client.listen()
    head, body = client.heard.pop()
    assert last[0][0] is head.state is State.DONE
    if mode == "elastic":
        pull = torch.empty(SIZE)
        if head.nbytes == client.codes.answer_bytes:
            client.codes.landing[:] = body
            client.codes.hear(head, pull)
        else:
            pull.view(torch.uint8).numpy()[:] = body
        assert bits(pull) == bits(last[1])
    else:
        assert head.nbytes == client.dense and body.tobytes() == bits(centre(again))


def test_a_difference_to_what_a_new_server_does_not_know_is_said_again_as_it_is() -> None:
    server = Server(Policy("elastic", 0.3))
    (client,) = group(server, 1, "ef+maxnorm")
    client.model += 1
    client.give()
    client.hear()
    client.break_off()
    client.connect()
    client.give()
    assert client.asked is not None and client.asked.head.nbytes == client.codes.push_bytes
    client.hear()
    assert client.asked is None and server.shards[0].version == 2
    known, mine = told(server, client.name), client.codes.state_dict()["told"]
    assert known is not None and mine is not None and bits(known) == bits(mine)
    torch.testing.assert_close(client.model + centre(server), torch.ones(SIZE))


@pytest.mark.parametrize("mode", ["async", "elastic"])
def test_what_is_not_finite_is_pushed_and_told_as_it_is(mode: str) -> None:
    server = Server(Policy(mode, 0.3))
    (client,) = group(server, 1, "ef+maxnorm")
    bad = np.full(SIZE, np.inf, np.float32)
    for values in (drawn(1), bad, drawn(2), drawn(3)):
        if mode == "elastic":
            client.model.copy_(torch.from_numpy(values))
        client.give(None if mode == "elastic" else values)
        client.hear()
    assert client.asked is None and client.let_in
    assert not bool(centre(server).isfinite().any())
    assert client.answered[-1] == (State.DONE, client.dense)


# Sums.


def mean_of(server: Server) -> np.ndarray:
    """What has been subtracted from the values, which were zero, at a rate of 0.1."""
    values: np.ndarray = centre(server).double().numpy() / -0.1
    return values


def kept(client: Coded) -> np.ndarray:
    residual = client.codes.state_dict()["residual"]
    assert residual is not None
    values: np.ndarray = residual.double().numpy()
    return values


def test_a_sum_counts_gradients_not_clients_and_what_was_not_said_is_kept() -> None:
    server = Server(Policy("sync"))
    clients = group(server, 3, "ef+maxnorm:bits=3", "float64")
    gradients, weights = [drawn(i, np.float64) for i in range(3)], [3.0, 1.0, 2.0]
    for client, gradient, weight in zip(clients, gradients, weights, strict=True):
        client.give(gradient, weight)
    hear_all(clients)
    said = sum(w * g for w, g in zip(weights, gradients, strict=True)) - sum(map(kept, clients))
    np.testing.assert_allclose(mean_of(server), said / 6, rtol=0, atol=1e-5)
    assert float(np.abs(kept(clients[0])).max()) > 0.1


def test_of_weight_0_nothing_is_added_whatever_it_is() -> None:
    server = Server(Policy("sync"))
    clients = group(server, 3, "ef+topk:ratio=0.05", "float64")
    bad = np.full(SIZE, np.nan)
    for weights in ([1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]):
        before = server.shards[0].version
        for i, (client, weight) in enumerate(zip(clients, weights, strict=True)):
            client.give(drawn(i, np.float64) if weight else bad, weight)
        hear_all(clients)
        assert server.shards[0].version == before + 1
        assert all(client.answered[-1][0] is State.DONE for client in clients)
        assert len({bits(client.model) for client in clients}) == 1
    total = drawn(0, np.float64) + drawn(2, np.float64) - kept(clients[0]) - kept(clients[2])
    wanted = total / 2 + drawn(1, np.float64) - kept(clients[1])
    np.testing.assert_allclose(mean_of(server), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["drop", "silence"])
def test_who_goes_in_the_middle_of_a_sum_is_left_out_of_it(how: str) -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2, "ef+maxnorm:bits=3", "float64")
    for client in (one, two):
        client.give(drawn(1, np.float64))
    for client in (one, two):
        client.hear(1)  # that it speaks as one of two
    one.hear()  # what all have said, and says the rest
    assert one.asked is not None and one.asked.head.part == 1
    if how == "drop":
        two.break_off()
    else:
        two.far.heard = -math.inf
        server.watch()
    one.hear()
    assert one.asked is None and one.answered[-1][0] is State.DONE
    np.testing.assert_allclose(mean_of(server), drawn(1, np.float64) - kept(one), rtol=0, atol=1e-5)
    if how == "drop":
        two.come_back()
    hear_all([two])
    assert two.answered[-1] == (State.LATE, two.dense) and not kept(two).any()
    for client in (one, two):
        client.give(drawn(2, np.float64))
    hear_all([one, two])
    assert two.answered[-1][0] is State.DONE


def test_who_is_back_before_the_others_have_gone_on_is_still_one_of_them() -> None:
    server = Server(Policy("sync"))
    clients = group(server, 3, "ef+maxnorm", "float64")
    for client in clients:
        client.give(drawn(1, np.float64))
    for _ in range(2):
        for client in clients[:2]:
            client.hear(1)
        clients[0].break_off()
        clients[0].come_back()
    hear_all(clients)
    assert server.shards[0].version == 1 and server.counting.left_out == 0


def test_a_sum_of_nobody_is_none_and_is_begun_again() -> None:
    server = Server(Policy("sync"))
    (client,) = group(server, 1, "ef+maxnorm", "float64")
    for seed in range(3):
        client.give(drawn(seed, np.float64))
        client.break_off()
        assert server.shards[0].version == seed
        client.come_back()
        client.hear(1)  # it has said all now, and nobody hears the answer
        client.break_off()
        client.come_back()
        hear_all([client])
        assert client.answered[-1] == (State.DONE, client.dense)
    np.testing.assert_allclose(
        mean_of(server), sum(drawn(i, np.float64) for i in range(3)) - kept(client), rtol=0, atol=1e-5
    )


def test_who_comes_in_the_middle_of_a_sum_is_not_waited_for() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2, "ef+maxnorm", "float64")
    two.say(Head(Kind.REST))
    one.give(drawn(1, np.float64))
    two.give(drawn(2, np.float64))
    one.hear()
    one.hear()
    assert one.answered[-1][0] is State.DONE
    hear_all([two])
    assert two.answered == [(State.LATE, two.dense)] and bits(two.model) == bits(centre(server))
    two.say(Head(Kind.REST))
    one.give(drawn(2, np.float64))
    two.say(Head(Kind.PULL, steps=1))  # it begins to push, but has nothing yet
    two.heard.clear()
    one.hear()
    one.hear()
    assert one.asked is None
    two.start()
    for client in (one, two):
        client.give(drawn(3, np.float64))
    hear_all([one, two])
    assert server.shards[0].version == 3 and two.answered[-1][0] is State.DONE


# What is not let in.


@pytest.mark.parametrize(
    ("compress", "text"),
    [
        ({"scheme": "zip", "tensors": [[]]}, "unknown compression scheme 'zip'"),
        ({"scheme": "maxnorm:bits=99", "tensors": [[]]}, "bits of a code"),
        ({"scheme": "ef+powersgd", "tensors": [[]]}, "cannot compress what goes to and from a server"),
        ({"scheme": 7, "tensors": [[]]}, "its compression cannot be used"),
        ({"scheme": "bf16"}, "describes no model"),
        ({"scheme": "bf16", "tensors": []}, "describes no model"),
        ({"scheme": "bf16", "tensors": [[[0, 9], [5, SIZE]]]}, "describes no model"),
        ({"scheme": "bf16", "tensors": [[[0, SIZE + 1]]]}, "describes no model"),
        ({"scheme": "bf16", "tensors": [["a"]]}, "describes no model"),
        ("bf16", "its compression cannot be used"),
        (5, "its compression cannot be used"),
    ],
)
def test_compression_that_makes_no_sense_is_refused(compress: Any, text: str) -> None:
    server = Server(Policy("async"))
    client = Talker(server, "a", contract_of([SIZE], compress=compress))
    assert not client.let_in
    assert re.search(text, client.reason), client.reason
    (other,) = group(server, 1, "bf16")
    assert other.let_in


def test_who_compresses_otherwise_is_refused() -> None:
    server = Server(Policy("async"))
    group(server, 1, "bf16")
    for contract in (contract_of([SIZE], compress=None), contract_with("ef+bf16", "async", [SIZE])):
        other = Talker(server, "b", contract)
        assert not other.let_in and other.reason.startswith("compress differs")
    server = Server(Policy("async"))
    assert Talker(server, "a", contract_of([SIZE], compress=None)).let_in
    other = Talker(server, "b", contract_with("bf16", "async", [SIZE]))
    assert not other.let_in and other.reason.startswith("compress differs")


def test_codes_that_are_none_end_their_client_alone() -> None:
    server = Server(Policy("async"))
    one, two = group(server, 2, "ef+topk:ratio=0.05")
    code = np.full(one.codes.push_bytes, 255, np.uint8)
    one.say(Head(Kind.PUSHPULL, round=1, weight=1.0), code)
    assert not one.let_in and "a code that cannot be read" in one.reason
    for kind, size in ((Kind.FILL, two.codes.push_bytes), (Kind.PUSH, 3), (Kind.PUSH, 0)):
        other = Coded(server, f"x{kind}{size}", "ef+topk:ratio=0.05")
        other.say(Head(kind, round=1, weight=1.0), np.zeros(size, np.uint8))
        assert not other.let_in, (kind, size)
    two.give(drawn(1))
    two.hear()
    assert two.answered == [(State.DONE, two.dense)]


def test_parts_of_a_sum_are_checked() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2, "ef+maxnorm")
    whole = np.zeros(one.dense, np.uint8)
    first = np.zeros(one.codes.begin(Request(Head(Kind.PUSH, weight=1.0)), one.model).head.nbytes, np.uint8)
    push = Head(Kind.PUSHPULL, round=1, weight=1.0)
    for part, terms, body in ((0, 99, whole), (0, 0, first), (1, 1, np.zeros(208, np.uint8))):
        two.say(replace(push, part=part, terms=terms), body)  # nobody can be so many, or is as far
        assert two.let_in, (two.reason, part)
        head, _ = two.heard.pop()
        assert (head.state, head.terms, head.nbytes) == (State.AGAIN, 2, 0)
    for part, weight, body in ((0, 1.0, whole), (9, 1.0, first), (0, 0.0, first), (0, 1.0, first[:-1])):
        other = Coded(server, f"x{part}{weight}{body.size}", "ef+maxnorm")
        other.say(replace(push, weight=weight, part=part, terms=1), body)
        assert not other.let_in, (part, weight, body.size)
    two.rounds[0] = 1
    for client in (one, two):
        client.give(drawn(1))
    two.hear(1)
    one.hear(1)  # both are one of two now, and have said their first parts
    two.listen()
    assert two.heard.pop()[0].state is State.MORE
    alone = ServerSum(coder_of(build("ef+maxnorm"), torch.float32, SIZE, SIZE, [(0, 200), (200, 400)])).sizes(
        1
    )
    two.say(replace(push, round=2, part=1, terms=1), np.zeros(alone[1], np.uint8))  # which is not one of two
    assert two.heard.pop()[0].state is State.AGAIN
    two.say(Head(Kind.REST))
    hear_all([one])
    assert one.answered == [(State.DONE, one.dense)]


def test_what_would_not_be_smaller_is_no_code() -> None:
    server = Server(Policy("async"))
    client = Talker(server, "a", contract_with("ef+topk:ratio=1", "async", [SIZE, 1]), [{"lr": 0.1}])
    for shard, size in enumerate((SIZE, 1)):
        client.fill(np.zeros(size, np.float32), shard)
        assert server.shards[shard].codes is None
        client.push(drawn(1, size=size), shard)
        assert client.answer()[1].size == size
