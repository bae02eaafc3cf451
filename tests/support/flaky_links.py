"""Links between a client and a server in one process, over streams with small chunks that break."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcsgd.server import Server
from hpcsgd.server.connection import Connection, Request
from hpcsgd.server.protocol import Handler, Header, Link, MessageType
from hpcsgd.server.tcp_link import TCPLink
from tests.support.protocol_clients import make_contract

SIZE = 50  # of the first shard


class StreamEnd:
    """Socket-like end of a stream that moves up to `chunk` bytes at a time and breaks after `remaining`."""

    def __init__(self, remaining: list[int], chunk: int) -> None:
        self.remaining, self.chunk = remaining, chunk
        self.incoming = bytearray()
        self.other = self
        self.closed = False

    @staticmethod
    def pair(nbytes: int, chunk: int) -> tuple[StreamEnd, StreamEnd]:
        remaining = [nbytes]
        one, other = StreamEnd(remaining, chunk), StreamEnd(remaining, chunk)
        one.other, other.other = other, one
        return one, other

    def setblocking(self, flag: bool) -> None: ...

    def setsockopt(self, *option: int) -> None: ...

    def send(self, data: memoryview) -> int:
        self._check()
        if len(self.other.incoming) >= self.chunk:
            raise BlockingIOError
        count = min(len(data), self.chunk, self.remaining[0])
        self.other.incoming += data[:count]
        self.remaining[0] -= count
        self._check()
        return count

    def recv_into(self, space: memoryview) -> int:
        self._check()
        if not self.incoming:
            if self.other.closed:
                return 0
            raise BlockingIOError
        count = min(len(space), len(self.incoming))
        space[:count] = self.incoming[:count]
        del self.incoming[:count]
        return count

    def close(self) -> None:
        self.closed = True

    def _check(self) -> None:
        if self.closed or self.remaining[0] <= 0:
            raise ConnectionResetError(104, "Connection reset by peer")


class FlakyConnector:
    """Connector whose links break after `link_lengths` bytes each; the last ones never break."""

    server_name = "the server"

    def __init__(self, server: Server, link_lengths: list[int], chunk: int = 2**20) -> None:
        self.server, self.link_lengths, self.chunk = server, list(link_lengths), chunk
        self.opened = 0

    def open(self, handler: Handler) -> Link:
        self.opened += 1
        one, other = StreamEnd.pair(self.link_lengths.pop(0) if self.link_lengths else 2**40, self.chunk)
        self.server_link = TCPLink(other, self.server, "a client")  # type: ignore[arg-type]
        self.server.add_link(self.server_link)
        return TCPLink(one, handler, "the server")  # type: ignore[arg-type]


def connect(connector: Any, name: str = "g", timeout: float = 10.0, **more: Any) -> Connection:
    mode = connector.server.policy.mode
    identity = {"client": name, "talker": 0, "talkers": 1, "contract": make_contract([SIZE, 3], mode)}
    return Connection(connector, lambda: {**identity, "options": [{"lr": 1.0}], **more}, timeout)


def pump_until(server: Server, *connections: Connection, until: Any) -> None:
    for _ in range(20_000):
        if until():
            return
        for connection in connections:
            connection.pump()
        server.pump(server.links)
    raise AssertionError("the condition was never met")


def exchange(
    server: Server,
    connection: Connection,
    message_type: MessageType,
    body: np.ndarray | None = None,
    **more: Any,
) -> Request:
    nbytes = 0 if body is None else body.nbytes
    target = np.empty(SIZE * 4, np.uint8) if message_type is not MessageType.CLAIM else None
    source = None if body is None else body.view(np.uint8).copy()
    request = Request(Header(message_type, nbytes=nbytes, **more), source, target)
    connection.send_request(request)
    pump_until(server, connection, until=lambda: request.done)
    return request


def reply_values(request: Request) -> np.ndarray:
    assert request.target is not None
    return request.target.view(np.float32)
