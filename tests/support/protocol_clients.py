"""Clients of a server in the same process, over queues that a test can cut."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Disconnected, Handler, Header, Link, MessageType, ReplyStatus, decode_json

ONES = np.ones(4, np.float32)


class QueueLink(Link):
    """One end of a link; bodies are copied when they are received, as by MPI and by the kernel."""

    def __init__(self, handler: Handler, name: str = "wire") -> None:
        super().__init__(handler, name)
        self.outgoing: deque[tuple[bytes, np.ndarray | None]] = deque()
        self.other: QueueLink = self
        self.closed = False

    @staticmethod
    def pair(one: Handler, other: Handler) -> tuple[QueueLink, QueueLink]:
        a, b = QueueLink(one, "the server"), QueueLink(other, "a client")
        a.other, b.other = b, a
        return a, b

    def _queue(self, header: Header, body: np.ndarray | None) -> None:
        assert body is None or body.nbytes == header.nbytes
        self.outgoing.append((header.pack(), body))

    def pump(self) -> bool:
        moved = False
        while self.other.outgoing and not self.closed:
            data, body = self.other.outgoing.popleft()
            space = self._begin_message(data)
            if body is not None:
                space[:] = body.view(np.uint8)
            self._end_message()
            moved = True
        if self.closed or self.other.closed:
            raise Disconnected("the connection broke")
        return moved

    @property
    def idle(self) -> bool:
        return not self.outgoing

    def close(self) -> None:
        self.closed = True


def make_contract(
    sizes: list[int], mode: str = "async", dtype: str = "float32", optimizer: str = "SGD", **more: Any
) -> dict[str, Any]:
    shards = [[dtype, size, [[0, size, 0]]] for size in sizes]
    return {"mode": mode, "servers": 1, "optimizer": optimizer, "shards": shards, **more}


class ScriptedClient:
    """Client that sends what a test sends with it, and collects the messages that it receives."""

    def __init__(
        self,
        server: Server,
        name: str,
        contract: dict[str, Any],
        options: list[dict[str, Any]] | None = None,
        hello: dict[str, Any] | None = None,
    ) -> None:
        self.server, self.name = server, name
        options = [{"lr": 1.0}] if options is None else options
        identity = {"client": name, "talker": 0, "talkers": 1, "contract": contract, "options": options}
        self.hello = {**identity, **(hello or {})}
        self.received: list[tuple[Header, np.ndarray]] = []
        self.push_numbers: dict[int, int] = {}
        self.versions: dict[int, int] = {}
        self.connect()

    def connect(self) -> None:
        self.welcomed, self.refusal, self.lost = False, "", ""
        self.link, self.server_link = QueueLink.pair(self, self.server)
        self.server.add_link(self.server_link)
        self.link.send_json(MessageType.HELLO, self.hello)
        self.deliver()
        self.receive()

    def deliver(self) -> None:
        """Let the server receive this client's messages."""
        if self.server_link in self.server.links:
            self.server.pump([self.server_link])

    def receive(self) -> None:
        """Receive the server's messages."""
        try:
            self.link.pump()
        except Disconnected as error:
            self.lost = str(error)

    def buffer_for(self, link: Link, header: Header) -> np.ndarray:
        return np.empty(header.nbytes, np.uint8)

    def on_message(self, link: Link, header: Header, body: np.ndarray) -> None:
        if header.type is MessageType.WELCOME:
            self.welcomed = True
        elif header.type is MessageType.REFUSAL:
            self.refusal = decode_json(body)["reason"]
        else:
            if header.nbytes:
                self.versions[header.shard] = header.version
            self.received.append((header, body))

    def send(self, header: Header, body: np.ndarray | None = None) -> None:
        """Send a message, and receive its immediate replies."""
        self.link.send(replace(header, nbytes=0 if body is None else body.nbytes), body)
        self.deliver()
        self.receive()

    def pull(self, shard: int = 0, dtype: Any = np.float32, joins: bool = False) -> np.ndarray:
        """Pull the values of a shard."""
        self.send(Header(MessageType.PULL, shard, steps=int(joins)))
        header, body = self.received.pop()
        assert (
            header.type is MessageType.REPLY and header.shard == shard and header.status is ReplyStatus.OK
        ), header
        return body.view(dtype)

    def initialize(self, values: np.ndarray, shard: int = 0) -> None:
        self.send(Header(MessageType.INIT, shard), values.view(np.uint8))
        assert self.received.pop()[0].type is MessageType.REPLY

    def push(self, values: np.ndarray, shard: int = 0, weight: float = 1.0, steps: int = 0) -> None:
        """Push, and receive the reply if there is one."""
        self.push_numbers[shard] = self.push_numbers.get(shard, 0) + 1
        header = Header(
            MessageType.PUSHPULL, shard, push_number=self.push_numbers[shard], weight=weight, steps=steps
        )
        self.send(replace(header, version=self.versions.get(shard, 0)), values.view(np.uint8))

    def pop_reply(self, dtype: Any = np.float32) -> tuple[Header, np.ndarray]:
        """Remove and return the only message that has been received."""
        assert len(self.received) == 1, self.received
        header, body = self.received.pop()
        return header, body.view(dtype)

    @property
    def admitted(self) -> bool:
        """Whether the server has admitted this client, and not closed the link since."""
        return self.welcomed and self.server_link in self.server.links


def make_clients(
    server: Server, count: int, size: int = 5, dtype: str = "float32", **more: Any
) -> list[ScriptedClient]:
    """Make clients that have pulled the initial values, which are zero."""
    contract = make_contract([size], server.policy.mode, dtype)
    clients = [ScriptedClient(server, f"g{i}", contract, **more) for i in range(count)]
    clients[0].initialize(np.zeros(size, dtype))
    for client in clients:
        client.pull(0, dtype)
    return clients


def centre(server: Server) -> np.ndarray:
    values = server.shards[0].centre
    assert values is not None
    return values.numpy(force=True)


def random_values(seed: int, size: int = 5, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


def json_body(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def make_client(server: Server, name: str = "g0", **more: Any) -> ScriptedClient:
    return ScriptedClient(server, name, make_contract([4, 6], server.policy.mode), **more)


def pair(policy: Policy) -> tuple[Server, ScriptedClient, ScriptedClient]:
    server = Server(policy)
    one, two = make_client(server), make_client(server, "g1")
    one.initialize(0 * ONES)
    one.initialize(np.zeros(6, np.float32), 1)
    for each in (one, two):
        each.pull(0)
        each.pull(1)
    return server, one, two


def assert_still_serves(server: Server, one: ScriptedClient) -> None:
    """Check that the server still applies a client's push."""
    version = server.shards[0].version
    one.received.clear()
    one.push(ONES)
    one.receive()
    assert one.pop_reply()[0].status is ReplyStatus.OK
    assert server.shards[0].version == version + 1
