"""A client's connection over links that break at any byte: every request gets one reply."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.errors import HpcsgdError
from hpcsgd.server import Policy, Server, connection
from hpcsgd.server.connection import Request
from hpcsgd.server.protocol import HEADER_BYTES, Handler, Header, Link, MessageType, ReplyStatus
from tests.support.flaky_links import SIZE, FlakyConnector, connect, exchange, pump_until, reply_values
from tests.support.protocol_clients import make_contract


@pytest.fixture(autouse=True, scope="module")
def at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_RETRY_INTERVAL", 0.0)
        yield


@given(
    st.lists(st.integers(1, 2000), max_size=25),
    st.integers(1, 700),
    st.sampled_from(["elastic", "async"]),
    st.integers(1, 6),
)
@settings(max_examples=25, deadline=None)
def test_every_request_is_answered_once(lengths: list[int], chunk: int, mode: str, pushes: int) -> None:
    server = Server(Policy(mode, 0.5))
    connectors = [FlakyConnector(server, lengths[i::2], chunk) for i in range(2)]
    both = [connect(connector, f"g{i}") for i, connector in enumerate(connectors)]
    models = [np.arange(SIZE, dtype=np.float32) * 4096 * (i + 1) for i in range(2)]
    first = exchange(server, both[0], MessageType.PULL)
    assert first.reply is not None and first.reply.status is ReplyStatus.NO_VALUES
    exchange(server, both[0], MessageType.INIT, np.zeros(SIZE, np.float32))
    versions = []
    for number in range(1, pushes + 1):
        for each, model in zip(both, models, strict=True):
            request = exchange(server, each, MessageType.PUSHPULL, model, push_number=number, weight=1.0)
            assert request.reply is not None and request.reply.status is ReplyStatus.OK
            assert request.reply.push_number == number
            versions.append(request.reply.version)
            if mode == "elastic":
                model -= reply_values(request)
    shard = server.shards[0]
    assert versions == list(range(1, 2 * pushes + 1)) and shard.version == 2 * pushes
    assert shard.centre is not None
    total = np.arange(SIZE, dtype=np.float32) * 4096 * 3
    found = shard.centre.numpy()
    if mode == "elastic":
        np.testing.assert_array_equal(found + models[0] + models[1], total)
    else:
        np.testing.assert_array_equal(found, -pushes * total)
    for connector, each in zip(connectors, both, strict=True):
        if connector.link_lengths:  # else the current link never breaks
            each.start_close()
            pump_until(server, each, until=lambda each=each: each.closed)


def test_requests_of_many_shards_are_under_way_at_once() -> None:
    server = Server(Policy("async"))
    connector = FlakyConnector(server, [900], 64)
    connection = connect(connector)
    bodies = [np.ones(SIZE, np.float32), np.ones(3, np.float32)]
    for message_type, more in (
        (MessageType.INIT, {}),
        (MessageType.PUSHPULL, {"push_number": 1, "weight": 1.0}),
    ):
        requests = []
        for shard, body in enumerate(bodies):
            header = Header(message_type, shard, nbytes=body.nbytes, **more)  # type: ignore[arg-type]
            requests.append(Request(header, body.view(np.uint8), np.empty(body.nbytes, np.uint8)))
            connection.send_request(requests[-1])
        claim = Request(Header(MessageType.CLAIM, steps=2))
        connection.send_request(claim)
        pump_until(server, connection, until=lambda r=requests, c=claim: all(x.done for x in (*r, c)))
    assert connector.opened == 2
    assert [reply_values(request).tolist() for request in requests] == [[0.0] * SIZE, [0.0] * 3]


def test_notifications_are_repeated_on_the_next_link() -> None:
    server = Server(Policy("sync"))
    connector = FlakyConnector(server, [])
    connection = connect(connector)
    exchange(server, connection, MessageType.INIT, np.zeros(SIZE, np.float32))
    server.start_steps(None)
    client = server.sessions["g"]
    assert client.is_awaited
    server.disconnect(connector.server_link, "test")
    connection.notify(Header(MessageType.PAUSE))
    connection.notify_json(MessageType.OPTIONS, {"options": [{"lr": 7.0}]})
    pump_until(server, connection, until=lambda: client.paused)
    assert client.options == [{"lr": 7.0}] and client.alive
    # A pause ends with the next push.
    exchange(server, connection, MessageType.PUSHPULL, np.ones(SIZE, np.float32), push_number=1, weight=1.0)
    assert not client.paused
    server.disconnect(connector.server_link, "test")
    request = exchange(server, connection, MessageType.PULL)
    assert reply_values(request).tolist() == [-7.0] * SIZE
    assert not client.paused


def test_restored_server_replies_to_a_repeated_push_without_applying_it() -> None:
    """The restored state holds the number of the last applied push."""
    server = Server(Policy("async"))
    connector = FlakyConnector(server, [])
    connection = connect(connector)
    exchange(server, connection, MessageType.INIT, np.zeros(SIZE, np.float32))
    exchange(server, connection, MessageType.PUSHPULL, np.ones(SIZE, np.float32), push_number=1, weight=1.0)
    again = Server(Policy("async"))
    again.set_contract(server.contract)
    for index, shard in server.shards.items():
        again.shards[index].load_state_dict(shard.state_dict())
    again.sessions["g"] = server.sessions["g"]
    server.disconnect(connector.server_link, "killed")
    connector.server = again
    for number, version in ((1, 1), (2, 2)):
        body = np.ones(SIZE, np.float32)
        request = exchange(
            again, connection, MessageType.PUSHPULL, body, push_number=number, version=1, weight=1.0
        )
        assert request.reply is not None and request.reply.version == version
        assert reply_values(request).tolist() == [-version] * SIZE


def test_heartbeats_are_sent_within_the_lease() -> None:
    server = Server(Policy("async", lease=0.08))
    connection = connect(FlakyConnector(server, []))
    pump_until(server, connection, until=lambda: server.sessions)
    server_link = server.links[0]
    pauses, received, deadline = [], server_link.received, time.monotonic() + 0.3
    while time.monotonic() < deadline:
        pauses.append(connection.pump())
        server.pump(server.links)
        time.sleep(0.002)
    assert server_link.received >= received + 3 * HEADER_BYTES
    assert all(0 <= pause <= 0.08 / 4 for pause in pauses)
    assert server.messages_received == 0  # heartbeats are not counted


# Failures.


def test_refused_client_raises_the_reason() -> None:
    server = Server(Policy("async"))
    good = connect(FlakyConnector(server, []), "a")
    pump_until(server, good, until=lambda: server.sessions)
    other = connect(FlakyConnector(server, []), "b", contract=make_contract([4]))
    with pytest.raises(HpcsgdError, match=r"does not admit this group\n.*shards differs"):
        pump_until(server, other, until=lambda: False)
    exchange(server, good, MessageType.INIT, np.zeros(SIZE, np.float32))


def test_protocol_error_raises_the_reason_and_is_not_retried() -> None:
    """As with a server that was restarted without its state."""
    server = Server(Policy("async"))
    connection = connect(FlakyConnector(server, []))
    with pytest.raises(HpcsgdError, match="pushed shard 0 before its values were initialized"):
        exchange(
            server, connection, MessageType.PUSHPULL, np.zeros(SIZE, np.float32), push_number=3, weight=1.0
        )


class FakeServer:
    """Sends given messages in place of a server."""

    def __init__(self, *messages: tuple[MessageType, dict[str, Any]]) -> None:
        self.messages, self.links = messages, []
        self.policy = Policy("async")

    def add_link(self, link: Link) -> None:
        self.links.append(link)
        for message_type, fields in self.messages:
            link.send_json(message_type, fields)

    def pump(self, links: list[Link]) -> None:
        for link in list(links):
            try:
                link.pump()
            except Exception:
                self.links.remove(link)
                link.close()

    def buffer_for(self, link: Link, header: Header) -> np.ndarray:
        return np.empty(header.nbytes, np.uint8)

    def on_message(self, link: Link, header: Header, body: np.ndarray) -> None: ...


@pytest.mark.parametrize(
    "messages",
    [
        [(MessageType.REPLY, {})],
        [(MessageType.GRANT, {})],
        [(MessageType.GOODBYE, {})],
        [(MessageType.HEARTBEAT, {})],
        [(MessageType.WELCOME, {"lease": None})],
        [(MessageType.WELCOME, {"lease": float("nan")})],
        [(MessageType.WELCOME, {"lease": "x" * 5_000_000})],
        [],
    ],
    ids=lambda messages: messages[0][0].name if messages else "nothing",
)
def test_server_that_violates_the_protocol_is_retried_until_the_timeout(messages: list[Any]) -> None:
    fake = FakeServer(*messages)
    connection = connect(FlakyConnector(fake, []), timeout=0.05)  # type: ignore[arg-type]
    with pytest.raises(HpcsgdError, match=r"the server cannot be reached for 0\.05 s"):
        pump_until(fake, connection, until=lambda: time.sleep(0.001))  # type: ignore[arg-type]


def test_absent_server_is_awaited_until_the_timeout() -> None:
    server = Server(Policy("async"))

    class Away(FlakyConnector):
        tries = 0

        def open(self, handler: Handler) -> Link:
            self.tries += 1
            if self.tries <= 5:
                raise OSError("connection refused")
            return super().open(handler)

    connection = connect(Away(server, []))
    exchange(server, connection, MessageType.INIT, np.zeros(SIZE, np.float32))

    class Gone(FlakyConnector):
        def open(self, handler: Handler) -> Link:
            raise OSError("connection refused")

    connection = connect(Gone(server, []), timeout=0.05)
    with pytest.raises(HpcsgdError, match=r"cannot be reached for 0\.05 s\n.*connection refused"):
        pump_until(server, connection, until=lambda: time.sleep(0.001))


def test_timeout_restarts_with_every_disconnect() -> None:
    server = Server(Policy("async"))
    connector = FlakyConnector(server, [])
    connection = connect(connector, timeout=0.4)
    exchange(server, connection, MessageType.INIT, np.zeros(SIZE, np.float32))
    time.sleep(0.45)
    server.disconnect(connector.server_link, "test")
    exchange(server, connection, MessageType.PULL)
    assert connector.opened == 2


def test_closing_is_confirmed_by_the_server() -> None:
    server = Server(Policy("async"))
    connection = connect(FlakyConnector(server, []))
    assert not connection.closed
    exchange(server, connection, MessageType.INIT, np.zeros(SIZE, np.float32))
    connection.start_close()
    assert not connection.closed
    pump_until(server, connection, until=lambda: connection.closed)
    assert server.sessions["g"].done and not server.links
    assert connection.pump() > 1


@pytest.mark.parametrize("broken", [True, False])
def test_closing_without_a_server_succeeds(broken: bool) -> None:
    server = Server(Policy("async"))
    connector = FlakyConnector(server, [])
    connection = connect(connector)
    if broken:
        exchange(server, connection, MessageType.INIT, np.zeros(SIZE, np.float32))
        connection.start_close()
        server.disconnect(connector.server_link, "test")
        connection.pump()
    else:
        connection.pump()  # a link without a welcome
        connection.start_close()
        server.pump(server.links)
        assert not server.links
    assert connection.closed
