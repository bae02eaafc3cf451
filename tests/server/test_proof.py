"""Greetings: only who has the secret, and with TLS the certificate, gets a connection."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server.certificate import make_server_context
from hpcsgd.server.proof import Greeting, ServerIdentity, greet_client, greet_server, new_secret
from tests.support.sockets import greet, sockets

CONTEXT, FINGERPRINT = make_server_context()
OTHER_CONTEXT, OTHER_FINGERPRINT = make_server_context()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    client, server = sockets()
    for end in (client, server):
        end.setblocking(False)
    yield client, server
    client.close()
    server.close()


Ends = tuple[socket.socket, socket.socket]


def assert_connected(client: object, server: object) -> None:
    assert isinstance(client, socket.socket) and isinstance(server, socket.socket), (client, server)
    for each in (client, server):
        each.settimeout(5)
    for one, other in ((client, server), (server, client)):
        one.sendall(b"to the other side")
        assert other.recv(100) == b"to the other side"
    for each in (client, server):
        each.close()


@pytest.mark.parametrize(
    ("identity", "fingerprint", "encrypted"),
    [
        (ServerIdentity("s"), "", False),
        (ServerIdentity("s", CONTEXT), FINGERPRINT, False),  # both ends are on this host
        (ServerIdentity("s", CONTEXT, True), FINGERPRINT, True),
    ],
)
def test_two_sides_with_the_secret_are_connected(
    ends: Ends, identity: ServerIdentity, fingerprint: str, encrypted: bool
) -> None:
    client, server = greet(greet_server(ends[0], "s", fingerprint), greet_client(ends[1], identity))
    assert isinstance(client, ssl.SSLSocket) == isinstance(server, ssl.SSLSocket) == encrypted
    assert_connected(client, server)


def test_link_is_encrypted_where_one_side_sees_another_host(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with network address translation between the two."""
    monkeypatch.setattr("hpcsgd.server.proof._is_local", lambda connection: connection is ends[1])
    client, server = greet(
        greet_server(ends[0], "s", FINGERPRINT), greet_client(ends[1], ServerIdentity("s", CONTEXT))
    )
    assert isinstance(client, ssl.SSLSocket) and client.version() == "TLSv1.3"
    assert_connected(client, server)


def test_ends_of_a_relay_that_each_see_a_local_one_are_encrypted(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = iter([b"s" * 32, b"c" * 32, b"c" * 32])  # in the order of the greeting
    monkeypatch.setattr("hpcsgd.server.proof._place", lambda: next(places))
    server, client = greet(
        greet_client(ends[1], ServerIdentity("s", CONTEXT)), greet_server(ends[0], "s", FINGERPRINT)
    )
    assert isinstance(client, ssl.SSLSocket) and isinstance(server, ssl.SSLSocket)
    assert_connected(client, server)


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("own", ["", "S", "ss", "é", new_secret()])
def test_client_without_the_secret_is_refused(ends: Ends, own: str, always: bool) -> None:
    client, server = greet(
        greet_server(ends[0], own, FINGERPRINT), greet_client(ends[1], ServerIdentity("s", CONTEXT, always))
    )
    assert client == "this client does not have the secret of the server's job"
    assert server == "the client does not have the secret of this job"
    assert ends[0].fileno() == ends[1].fileno() == -1  # closed


def test_server_without_the_secret_is_refused(ends: Ends) -> None:
    def impostor() -> Greeting:
        server = ends[1]
        server.send(b"hpcsgd2\n" + bytes(65))
        while True:
            try:
                server.recv(97)
                break
            except BlockingIOError:
                yield 1
        server.send(b"x" * 32)
        return server

    client, _ = greet(greet_server(ends[0], "s", ""), impostor())
    assert client == "the server does not have the secret of this job"


def test_server_with_another_certificate_is_refused(ends: Ends) -> None:
    client, server = greet(
        greet_server(ends[0], "s", FINGERPRINT),
        greet_client(ends[1], ServerIdentity("s", OTHER_CONTEXT, True)),
    )
    assert client == "the server does not have the certificate of this job"
    assert server == "the other side closed the connection"


def test_encryption_that_one_side_lacks_is_an_error(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = greet(
        greet_server(ends[0], "s", ""), greet_client(ends[1], ServerIdentity("s", CONTEXT, True))
    )
    assert client == "the server wants encryption, and its file has no certificate"
    assert "closed" in str(server) or "broke" in str(server)
    one, other = sockets()
    one.setblocking(False)
    other.setblocking(False)
    monkeypatch.setattr("hpcsgd.server.proof._is_local", lambda connection: False)
    client, server = greet(greet_server(one, "s", FINGERPRINT), greet_client(other, ServerIdentity("s")))
    assert "does not have (--no-tls)" in str(server) and isinstance(client, str)


def test_proof_that_is_passed_on_admits_nobody(ends: Ends) -> None:
    """Somebody between the two has the client's proof, and makes TLS with the server on his own."""
    middle_to_client, middle_to_server = ends[1], None
    one, middle_to_server = sockets()
    middle_to_server, one = one, middle_to_server
    for end in (one, middle_to_server):
        end.setblocking(False)

    def middle() -> Greeting:
        for source, target, nbytes in (
            (middle_to_server, middle_to_client, 73),
            (middle_to_client, middle_to_server, 97),
            (middle_to_server, middle_to_client, 32),
        ):
            data = b""
            while len(data) < nbytes:
                try:
                    data += source.recv(nbytes - len(data))
                except BlockingIOError:
                    yield 1
            target.send(data)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        encrypted = context.wrap_socket(middle_to_server, do_handshake_on_connect=False)
        while True:
            try:
                encrypted.do_handshake()
                break
            except ssl.SSLWantReadError:
                yield 1
        encrypted.send(data)  # the server's own proof, or any other 32 bytes
        middle_to_client.close()
        return encrypted

    client, _, server = greet(
        greet_server(ends[0], "s", FINGERPRINT),
        middle(),
        greet_client(one, ServerIdentity("s", CONTEXT, True)),
    )
    assert isinstance(client, str) and server == "the client does not have the secret of this job"


@given(st.binary(max_size=200), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_any_other_bytes_are_refused_by_both_sides(junk: bytes, cut: int) -> None:
    for greeting_of, own in ((greet_client, ServerIdentity("s", CONTEXT)), (greet_server, "s")):
        peer, end = sockets()
        end.setblocking(False)
        greeting = greeting_of(end, own) if greeting_of is greet_client else greet_server(end, "s", "")
        peer.sendall(junk[:cut])
        next(greeting, None)
        peer.sendall(junk[cut:])
        peer.shutdown(socket.SHUT_WR)
        (found,) = greet(greeting)
        assert isinstance(found, str)
        peer.close()
        assert end.fileno() == -1


@pytest.mark.parametrize("always", [False, True])
def test_greeting_survives_cuts_at_every_byte(always: bool) -> None:
    """Each side's bytes arrive one by one."""
    client, to_client = sockets()
    to_server, server = sockets()
    for end in (client, to_client, to_server, server):
        end.setblocking(False)

    def passing() -> Greeting:
        while True:
            for source, target in ((to_client, to_server), (to_server, to_client)):
                try:
                    data = source.recv(1)
                except BlockingIOError:
                    continue
                if data:
                    target.send(data)
            yield 1

    relay = passing()
    greetings = [
        greet_server(client, "s", FINGERPRINT),
        greet_client(server, ServerIdentity("s", CONTEXT, always)),
    ]
    ends: dict[int, socket.socket] = {}
    for _ in range(100_000):
        next(relay)
        for number, greeting in enumerate(greetings):
            if number not in ends:
                try:
                    next(greeting)
                except StopIteration as done:
                    ends[number] = done.value
        if len(ends) == 2:
            break
    assert sorted(ends) == [0, 1]
    for end in (*ends.values(), to_client, to_server):
        end.close()


def test_greeting_that_is_given_up_closes_its_connection(ends: Ends) -> None:
    greeting = greet_client(ends[1], ServerIdentity("s", CONTEXT, True))
    next(greeting)
    greeting.close()
    assert ends[1].fileno() == -1


def test_certificate_leaves_nothing_on_disk_and_no_descriptor() -> None:
    import os

    before = os.listdir("/proc/self/fd")
    _, fingerprint = make_server_context()
    assert os.listdir("/proc/self/fd") == before
    assert len(fingerprint) == 64 and fingerprint not in (FINGERPRINT, OTHER_FINGERPRINT)
