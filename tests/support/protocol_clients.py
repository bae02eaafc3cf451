"""Clients of a server in the same process: their links are queues, which can be cut."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from hpcsgd.server import Policy, Server, tcp_link
from hpcsgd.server.protocol import Head, Kind, Link, Lost, Party, State, read_note

ONES = np.ones(4, np.float32)


class Wire(Link):
    """One end of a link; a body is only read when it is received, as by MPI and by the kernel."""

    def __init__(self, party: Party, name: str = "wire") -> None:
        super().__init__(party, name)
        self.leaving: deque[tuple[bytes, np.ndarray | None]] = deque()
        self.other: Wire = self
        self.closed = False

    @staticmethod
    def pair(one: Party, other: Party) -> tuple[Wire, Wire]:
        a, b = Wire(one, "the server"), Wire(other, "a client")
        a.other, b.other = b, a
        return a, b

    def _queue(self, head: Head, body: np.ndarray | None) -> None:
        assert body is None or body.nbytes == head.nbytes
        self.leaving.append((head.pack(), body))

    def pump(self) -> bool:
        moved = False
        while self.other.leaving and not self.closed:
            data, body = self.other.leaving.popleft()
            space = self._begin(data)
            if body is not None:
                space[:] = body.view(np.uint8)
            self._end()
            moved = True
        if self.closed or self.other.closed:
            raise Lost("the connection broke")
        return moved

    @property
    def idle(self) -> bool:
        return not self.leaving

    def close(self) -> None:
        self.closed = True


def contract_of(
    sizes: list[int], mode: str = "async", dtype: str = "float32", optimizer: str = "SGD", **more: Any
) -> dict[str, Any]:
    shards = [[dtype, size, [[0, size, 0]]] for size in sizes]
    return {"mode": mode, "servers": 1, "optimizer": optimizer, "shards": shards, **more}


class Talker:
    """A client that says exactly what it is told to say, and keeps what it hears."""

    def __init__(
        self,
        server: Server,
        name: str,
        contract: dict[str, Any],
        options: list[dict[str, Any]] | None = None,
        secret: str = "",
        hello: dict[str, Any] | None = None,
    ) -> None:
        self.server, self.name, self.secret = server, name, secret
        options = [{"lr": 1.0}] if options is None else options
        who = {"client": name, "talker": 0, "talkers": 1, "contract": contract, "options": options}
        self.hello = {**who, **(hello or {})}
        self.heard: list[tuple[Head, np.ndarray]] = []
        self.rounds: dict[int, int] = {}
        self.versions: dict[int, int] = {}
        self.connect()

    def connect(self) -> None:
        self.welcome, self.reason, self.lost = False, "", ""
        self.link, self.far = Wire.pair(self, self.server)
        self.server.add(self.far)
        for _ in range(3):
            self.listen()
            self.deliver()
        self.listen()

    def deliver(self) -> None:
        """Let the server hear what was said."""
        if self.far in self.server.links:
            self.server.pump([self.far])

    def listen(self) -> None:
        """Hear what the server has said."""
        try:
            self.link.pump()
        except Lost as error:
            self.lost = str(error)

    def landing(self, link: Link, head: Head) -> np.ndarray:
        return np.empty(head.nbytes, np.uint8)

    def take(self, link: Link, head: Head, body: np.ndarray) -> None:
        if head.kind is Kind.CHALLENGE:
            proof = tcp_link.proof(self.secret, read_note(body)["nonce"])
            link.send_note(Kind.HELLO, {"nonce": "mine", "proof": proof, **self.hello})
        elif head.kind is Kind.WELCOME:
            self.welcome = tcp_link.proves(self.secret, "mine", read_note(body)["proof"])
        elif head.kind is Kind.REFUSAL:
            self.reason = read_note(body)["reason"]
        else:
            if head.nbytes:
                self.versions[head.shard] = head.version
            self.heard.append((head, body))

    def say(self, head: Head, body: np.ndarray | None = None) -> None:
        """Say something at once, and hear what is answered at once."""
        self.link.send(replace(head, nbytes=0 if body is None else body.nbytes), body)
        self.deliver()
        self.listen()

    def fetch(self, shard: int = 0, dtype: Any = np.float32) -> np.ndarray:
        """The values."""
        self.say(Head(Kind.PULL, shard))
        head, body = self.heard.pop()
        assert head.kind is Kind.REPLY and head.shard == shard and head.state is State.DONE, head
        return body.view(dtype)

    def fill(self, values: np.ndarray, shard: int = 0) -> None:
        self.say(Head(Kind.FILL, shard), values.view(np.uint8))
        assert self.heard.pop()[0].kind is Kind.REPLY

    def push(self, values: np.ndarray, shard: int = 0, weight: float = 1.0, steps: int = 0) -> None:
        """Push, and hear the answer if there is one."""
        self.rounds[shard] = self.rounds.get(shard, 0) + 1
        head = Head(Kind.PUSHPULL, shard, round=self.rounds[shard], weight=weight, steps=steps)
        self.say(replace(head, version=self.versions.get(shard, 0)), values.view(np.uint8))

    def answer(self, dtype: Any = np.float32) -> tuple[Head, np.ndarray]:
        """The only one that has come."""
        assert len(self.heard) == 1, self.heard
        head, body = self.heard.pop()
        return head, body.view(dtype)

    @property
    def let_in(self) -> bool:
        """Whether the server still talks to it."""
        return self.welcome and self.far in self.server.links


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


def as_bytes(note: object) -> np.ndarray:
    return np.frombuffer(json.dumps(note).encode(), np.uint8)


def talker(server: Server, name: str = "g0", **more: Any) -> Talker:
    return Talker(server, name, contract_of([4, 6], server.policy.mode), **more)


def pair(policy: Policy) -> tuple[Server, Talker, Talker]:
    server = Server(policy)
    one, two = talker(server), talker(server, "g1")
    one.fill(0 * ONES)
    one.fill(np.zeros(6, np.float32), 1)
    for each in (one, two):
        each.fetch(0)
        each.fetch(1)
    return server, one, two


def goes_on(server: Server, one: Talker) -> None:
    """The other one's push is still counted."""
    version = server.shards[0].version
    one.heard.clear()
    one.push(ONES)
    one.listen()
    assert one.answer()[0].state is State.DONE
    assert server.shards[0].version == version + 1
