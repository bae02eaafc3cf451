"""Links over TCP: whatever the network makes of the bytes, messages come whole or the link is lost."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import HpcsgdError
from hpcsgd.server import tcp_link
from hpcsgd.server.protocol import HEAD_BYTES, Head, Kind, Link, Lost, Malformed
from hpcsgd.server.tcp_link import Meeting, SocketLink


class Ear:
    """Takes everything, up to a size, and keeps it."""

    def __init__(self, most: int = 2**24) -> None:
        self.most = most
        self.heard: list[tuple[Head, bytes]] = []

    def landing(self, link: Link, head: Head) -> np.ndarray:
        if head.nbytes > self.most:
            raise Malformed("too much")
        return np.empty(head.nbytes, np.uint8)

    def take(self, link: Link, head: Head, body: np.ndarray) -> None:
        self.heard.append((head, body.tobytes()))


def sockets() -> tuple[socket.socket, socket.socket]:
    listener = tcp_link.listen("127.0.0.1")
    one = socket.create_connection(listener.getsockname())
    listener.setblocking(True)
    other, _ = listener.accept()
    listener.close()
    return one, other


def links() -> tuple[SocketLink, SocketLink, Ear]:
    ear = Ear()
    one, other = sockets()
    return SocketLink(one, Ear(), "b"), SocketLink(other, ear, "a"), ear


def pump_until_lost(link: Link) -> str:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            link.pump()
        except Lost as error:
            return str(error)
    raise AssertionError("it was never lost")


@given(sizes=st.lists(st.sampled_from([0, 1, 71, 72, 73, 5000]), min_size=1, max_size=6), data=st.data())
@settings(max_examples=25, deadline=None)
def test_messages_may_be_cut_anywhere(sizes: list[int], data: st.DataObject) -> None:
    bodies = [
        np.random.default_rng(i).integers(0, 256, size).astype(np.uint8) for i, size in enumerate(sizes)
    ]
    stream = b"".join(
        Head(Kind.PUSH, shard=i, nbytes=body.size).pack() + body.tobytes() for i, body in enumerate(bodies)
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    one, other = sockets()
    ear = Ear()
    link = SocketLink(other, ear, "a")
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        one.sendall(stream[start:stop])
        deadline = time.monotonic() + 5
        while not link.pump() and time.monotonic() < deadline:
            pass
    while len(ear.heard) < len(bodies) and time.monotonic() < deadline:
        link.pump()
    assert [(head.shard, body) for head, body in ear.heard] == [
        (i, b.tobytes()) for i, b in enumerate(bodies)
    ]
    assert link.received == len(stream)
    one.close()
    assert "closed" in pump_until_lost(link)
    link.close()


def test_large_messages_go_both_ways_at_once() -> None:
    size = 5 * 2**20
    ears, (a, b) = (Ear(), Ear()), sockets()
    traffic = Traffic()
    ends = [SocketLink(a, ears[0], "b", traffic), SocketLink(b, ears[1], "a")]
    bodies = [np.full(size, i, np.uint8) for i in range(2)]
    for link, body in zip(ends, bodies, strict=True):
        for kind in (Kind.PUSH, Kind.BEAT, Kind.REPLY):
            values = None if kind is Kind.BEAT else body
            link.send(Head(kind, nbytes=0 if values is None else size), values)
    deadline = time.monotonic() + 10
    while any(len(ear.heard) < 3 for ear in ears) and time.monotonic() < deadline:
        for link in ends:
            link.pump()
    for ear, body in zip(ears, reversed(bodies), strict=True):
        assert [head.kind for head, _ in ear.heard] == [Kind.PUSH, Kind.BEAT, Kind.REPLY]
        assert [data for _, data in ear.heard] == [body.tobytes(), b"", body.tobytes()]
    assert all(link.idle for link in ends)
    assert traffic.sent == 2 * size and ends[0].sent == ends[1].received == 2 * size + 3 * HEAD_BYTES
    for link in ends:
        link.close()


def test_a_message_that_is_too_large_is_refused_before_it_comes() -> None:
    one, other, ear = links()
    head = Head(Kind.PUSH, nbytes=2**40)
    one._queue(head, None)
    one.pump()
    assert pump_until_lost(other) == "too much"
    assert not ear.heard
    one.close()
    other.close()


def test_a_party_may_take_no_other_size_than_was_announced() -> None:
    one, other, ear = links()
    ear.landing = lambda link, head: np.empty(3, np.uint8)  # type: ignore[method-assign]
    one.send(Head(Kind.PUSH, nbytes=4), np.zeros(4, np.uint8))
    one.pump()
    assert "4 bytes where 3" in pump_until_lost(other)
    one.close()
    other.close()


@pytest.mark.parametrize("sent", [0, 10, HEAD_BYTES, HEAD_BYTES + 100])
def test_an_end_in_the_middle_is_noticed(sent: int) -> None:
    one, other = sockets()
    ear = Ear()
    link = SocketLink(other, ear, "a")
    one.sendall((Head(Kind.PUSH, nbytes=200).pack() + bytes(200))[:sent])
    one.close()
    assert pump_until_lost(link) == "it closed the connection"
    assert not ear.heard
    link.close()


def test_a_reset_is_noticed() -> None:
    one, other = sockets()
    link = SocketLink(other, Ear(), "a")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
    assert "reset" in pump_until_lost(link)
    link.close()
    assert "broke" in pump_until_lost(link)  # as a link that was closed while others were pumped


def test_to_write_to_who_is_gone_is_noticed() -> None:
    one, other, _ = links()
    other.close()
    one.send(Head(Kind.PUSH, nbytes=2**22), np.zeros(2**22, np.uint8))
    pump_until_lost(one)
    one.flush()  # says nothing
    one.close()


def test_an_error_of_the_party_is_not_taken_for_one_of_the_network() -> None:
    one, other, ear = links()

    def full(link: Link, head: Head, body: np.ndarray) -> None:
        raise OSError("no space left on device")

    ear.take = full  # type: ignore[method-assign]
    one.send(Head(Kind.BEAT))
    one.pump()
    deadline = time.monotonic() + 5
    with pytest.raises(OSError, match="no space"):
        while time.monotonic() < deadline:
            other.pump()
    one.close()
    other.close()


def test_what_comes_is_heard() -> None:
    one, other, ear = links()
    other.heard -= 100
    before = other.heard
    one._socket.sendall(Head(Kind.PUSH, nbytes=50).pack() + bytes(20))  # not yet all of it
    while not other.pump():
        pass
    assert other.heard > before and not ear.heard
    one.close()
    other.close()


# The file by which jobs find each other.


def test_a_meeting_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "meeting"
    meeting = Meeting(tcp_link.new_secret(), [(["10.0.0.1", "127.0.0.1"], 4711), (["h"], 1)])
    old = os.umask(0)
    try:
        path.write_text("what another job has left")
        meeting.write(path)
    finally:
        os.umask(old)
    assert Meeting.read(path) == meeting
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["meeting"]


@pytest.mark.parametrize(
    "junk",
    [b"", b"\xff\xfe\x00junk", b"[]", b"{}", b"3", b'{"secret": "x"}', b'{"secret": "x", "servers": 3}']
    + [b'{"secret": "x", "servers": [[["h"], %s]]}' % port for port in (b'"p"', b"0", b"70000", b"1e999")]
    + [b'{"secret": "x", "servers": [["h"]]}', b"[" * 100_000],
    ids=lambda junk: repr(junk[:40]),
)
def test_a_file_that_is_no_meeting_is_said_to_be_none(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "meeting"
    path.write_bytes(junk)
    with pytest.raises(HpcsgdError, match="is not a file of"):
        Meeting.read(path)


def test_where_there_is_no_file_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Meeting.read(tmp_path / "meeting")


def test_the_first_address_that_answers_is_taken() -> None:
    listener = tcp_link.listen("127.0.0.1")
    port = listener.getsockname()[1]
    connection = tcp_link.connect(["127.0.0.2", "127.0.0.1"], port)
    assert connection.getpeername() == ("127.0.0.1", port)
    connection.close()
    listener.close()
    with pytest.raises(OSError, match=str(port)):
        tcp_link.connect(["127.0.0.1"], port)


def test_nobody_talks_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP connects a port to itself where a client happens to be given the port that it asks for."""
    own = socket.socket()
    own.bind(("127.0.0.1", 0))
    own.connect(own.getsockname())
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: own)
    with pytest.raises(OSError, match="nobody is there"):
        tcp_link.connect(["127.0.0.1"], own.getsockname()[1])


def test_the_own_addresses_end_with_the_loopback() -> None:
    found = tcp_link.addresses()
    assert "127.0.0.1" in found
    assert all(socket.inet_aton(address) for address in found)
    assert [a.startswith("127.") for a in found] == sorted(a.startswith("127.") for a in found)


@given(st.text(), st.text())
@settings(max_examples=40, deadline=None)
def test_only_the_secret_proves_itself(secret: str, nonce: str) -> None:
    nonce = json.loads(json.dumps(nonce))
    proof = tcp_link.proof(tcp_link.new_secret() + "x", nonce)
    own = tcp_link.new_secret()
    assert tcp_link.proves(own, nonce, tcp_link.proof(own, nonce))
    for wrong in (proof, secret, None, 3, "\ud800", "é"):
        assert not tcp_link.proves(own, nonce, wrong)


def test_a_nonce_may_be_any_text() -> None:
    assert tcp_link.proof("s", "\ud800") != tcp_link.proof("s", "\ud801")
