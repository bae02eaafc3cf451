"""TCP links: messages are delivered complete, or the link is disconnected."""

from __future__ import annotations

import socket
import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.server.protocol import HEADER_BYTES, Disconnected, Header, Link, MessageType, ProtocolError
from hpcsgd.server.tcp_link import TCPLink
from tests.support.sockets import sockets


class RecordingHandler:
    """Collects all messages up to a size."""

    def __init__(self, most: int = 2**24) -> None:
        self.most = most
        self.received: list[tuple[Header, bytes]] = []

    def buffer_for(self, link: Link, header: Header) -> np.ndarray:
        if header.nbytes > self.most:
            raise ProtocolError("too much")
        return np.empty(header.nbytes, np.uint8)

    def on_message(self, link: Link, header: Header, body: np.ndarray) -> None:
        self.received.append((header, body.tobytes()))


def links() -> tuple[TCPLink, TCPLink, RecordingHandler]:
    handler = RecordingHandler()
    one, other = sockets()
    return TCPLink(one, RecordingHandler(), "b"), TCPLink(other, handler, "a"), handler


def pump_until_lost(link: Link) -> str:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            link.pump()
        except Disconnected as error:
            return str(error)
    raise AssertionError("it was never lost")


@given(sizes=st.lists(st.sampled_from([0, 1, 71, 72, 73, 5000]), min_size=1, max_size=6), data=st.data())
@settings(max_examples=25, deadline=None)
def test_messages_may_be_cut_anywhere(sizes: list[int], data: st.DataObject) -> None:
    bodies = [
        np.random.default_rng(i).integers(0, 256, size).astype(np.uint8) for i, size in enumerate(sizes)
    ]
    stream = b"".join(
        Header(MessageType.PUSH, shard=i, nbytes=body.size).pack() + body.tobytes()
        for i, body in enumerate(bodies)
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    one, other = sockets()
    handler = RecordingHandler()
    link = TCPLink(other, handler, "a")
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        one.sendall(stream[start:stop])
        deadline = time.monotonic() + 5
        while not link.pump() and time.monotonic() < deadline:
            pass
    while len(handler.received) < len(bodies) and time.monotonic() < deadline:
        link.pump()
    assert [(header.shard, body) for header, body in handler.received] == [
        (i, b.tobytes()) for i, b in enumerate(bodies)
    ]
    assert link.received == len(stream)
    one.close()
    assert "closed" in pump_until_lost(link)
    link.close()


def test_large_messages_go_both_ways_at_once() -> None:
    size = 5 * 2**20
    handlers, (a, b) = (RecordingHandler(), RecordingHandler()), sockets()
    traffic = Traffic()
    ends = [TCPLink(a, handlers[0], "b", traffic), TCPLink(b, handlers[1], "a")]
    bodies = [np.full(size, i, np.uint8) for i in range(2)]
    for link, body in zip(ends, bodies, strict=True):
        for kind in (MessageType.PUSH, MessageType.HEARTBEAT, MessageType.REPLY):
            values = None if kind is MessageType.HEARTBEAT else body
            link.send(Header(kind, nbytes=0 if values is None else size), values)
    deadline = time.monotonic() + 10
    while any(len(handler.received) < 3 for handler in handlers) and time.monotonic() < deadline:
        for link in ends:
            link.pump()
    for handler, body in zip(handlers, reversed(bodies), strict=True):
        assert [header.type for header, _ in handler.received] == [
            MessageType.PUSH,
            MessageType.HEARTBEAT,
            MessageType.REPLY,
        ]
        assert [data for _, data in handler.received] == [body.tobytes(), b"", body.tobytes()]
    assert all(link.idle for link in ends)
    assert traffic.sent == 2 * size and ends[0].sent == ends[1].received == 2 * size + 3 * HEADER_BYTES
    for link in ends:
        link.close()


def test_too_large_message_is_rejected_before_its_body() -> None:
    one, other, handler = links()
    header = Header(MessageType.PUSH, nbytes=2**40)
    one._queue(header, None)
    one.pump()
    assert pump_until_lost(other) == "too much"
    assert not handler.received
    one.close()
    other.close()


def test_buffer_of_another_size_is_an_error() -> None:
    one, other, handler = links()
    handler.buffer_for = lambda link, header: np.empty(3, np.uint8)  # type: ignore[method-assign]
    one.send(Header(MessageType.PUSH, nbytes=4), np.zeros(4, np.uint8))
    one.pump()
    assert "4 bytes where 3" in pump_until_lost(other)
    one.close()
    other.close()


@pytest.mark.parametrize("sent", [0, 10, HEADER_BYTES, HEADER_BYTES + 100])
def test_truncated_message_is_a_disconnect(sent: int) -> None:
    one, other = sockets()
    handler = RecordingHandler()
    link = TCPLink(other, handler, "a")
    one.sendall((Header(MessageType.PUSH, nbytes=200).pack() + bytes(200))[:sent])
    one.close()
    assert pump_until_lost(link) == "the other side closed the connection"
    assert not handler.received
    link.close()


def test_reset_is_a_disconnect() -> None:
    one, other = sockets()
    link = TCPLink(other, RecordingHandler(), "a")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
    assert "reset" in pump_until_lost(link)
    link.close()
    assert "broke" in pump_until_lost(link)  # as for a link that was closed while others were pumped


def test_sending_to_a_closed_link_is_a_disconnect() -> None:
    one, other, _ = links()
    other.close()
    one.send(Header(MessageType.PUSH, nbytes=2**22), np.zeros(2**22, np.uint8))
    pump_until_lost(one)
    one.flush()  # raises nothing
    one.close()


def test_os_error_of_the_handler_is_not_a_disconnect() -> None:
    one, other, handler = links()

    def full(link: Link, header: Header, body: np.ndarray) -> None:
        raise OSError("no space left on device")

    handler.on_message = full  # type: ignore[method-assign]
    one.send(Header(MessageType.HEARTBEAT))
    one.pump()
    deadline = time.monotonic() + 5
    with pytest.raises(OSError, match="no space"):
        while time.monotonic() < deadline:
            other.pump()
    one.close()
    other.close()


def test_partial_message_counts_as_received() -> None:
    one, other, handler = links()
    other.last_received -= 100
    before = other.last_received
    one._socket.sendall(Header(MessageType.PUSH, nbytes=50).pack() + bytes(20))  # an incomplete message
    while not other.pump():
        pass
    assert other.last_received > before and not handler.received
    one.close()
    other.close()
