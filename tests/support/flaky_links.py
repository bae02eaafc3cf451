"""Streams between a client and a server in one process, which move few bytes at a time and break."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcsgd.server import Server
from hpcsgd.server.connection import Connection, Request
from hpcsgd.server.protocol import Head, Kind, Link, Party
from hpcsgd.server.tcp_link import SocketLink
from tests.support.protocol_clients import contract_of

SIZE = 50  # of the first shard


class Plug:
    """One end of a stream that moves a few bytes at a time, and is cut after so many."""

    def __init__(self, left: list[int], chunk: int) -> None:
        self.left, self.chunk = left, chunk
        self.coming = bytearray()
        self.other = self
        self.closed = False

    @staticmethod
    def pair(nbytes: int, chunk: int) -> tuple[Plug, Plug]:
        left = [nbytes]
        one, other = Plug(left, chunk), Plug(left, chunk)
        one.other, other.other = other, one
        return one, other

    def setblocking(self, flag: bool) -> None: ...

    def setsockopt(self, *option: int) -> None: ...

    def send(self, data: memoryview) -> int:
        self._check()
        if len(self.other.coming) >= self.chunk:
            raise BlockingIOError
        count = min(len(data), self.chunk, self.left[0])
        self.other.coming += data[:count]
        self.left[0] -= count
        self._check()
        return count

    def recv_into(self, space: memoryview) -> int:
        self._check()
        if not self.coming:
            if self.other.closed:
                return 0
            raise BlockingIOError
        count = min(len(space), len(self.coming))
        space[:count] = self.coming[:count]
        del self.coming[:count]
        return count

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.closed or self.left[0] <= 0:
            raise ConnectionResetError(104, "Connection reset by peer")


class Plugs:
    """A dial whose links hold for so many bytes each, and the last ones for ever."""

    server = "the server"

    def __init__(self, server: Server, lengths: list[int], chunk: int = 2**20, secret: str = "") -> None:
        self.served, self.lengths, self.chunk, self.secret = server, list(lengths), chunk, secret
        self.opened = 0

    def open(self, party: Party) -> tuple[Link, str]:
        self.opened += 1
        one, other = Plug.pair(self.lengths.pop(0) if self.lengths else 2**40, self.chunk)
        self.far = SocketLink(other, self.served, "a client")  # type: ignore[arg-type]
        self.served.add(self.far)
        return SocketLink(one, party, "the server"), self.secret  # type: ignore[arg-type]


def connect(dial: Any, name: str = "g", patience: float = 10.0, **more: Any) -> Connection:
    mode = dial.served.policy.mode
    who = {"client": name, "talker": 0, "talkers": 1, "contract": contract_of([SIZE, 3], mode)}
    return Connection(dial, lambda: {**who, "options": [{"lr": 1.0}], **more}, patience)


def run(server: Server, *connections: Connection, until: Any) -> None:
    for _ in range(20_000):
        if until():
            return
        for each in connections:
            each.pump()
        server.pump(server.links)
    raise AssertionError("it never came to an end")


def ask(
    server: Server, asking: Connection, kind: Kind, body: np.ndarray | None = None, **more: Any
) -> Request:
    nbytes = 0 if body is None else body.nbytes
    target = np.empty(SIZE * 4, np.uint8) if kind is not Kind.CLAIM else None
    source = None if body is None else body.view(np.uint8).copy()
    request = Request(Head(kind, nbytes=nbytes, **more), source, target)
    asking.ask(request)
    run(server, asking, until=lambda: request.done)
    return request


def values(request: Request) -> np.ndarray:
    assert request.target is not None
    return request.target.view(np.float32)
