"""A server is reached at the first of its addresses that leads to it, whatever is at the others."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from hpcsgd.server import reaching
from hpcsgd.server.listening import listen
from hpcsgd.server.proof import Greeting, SecretError, ServerIdentity
from hpcsgd.server.protocol import Disconnected
from hpcsgd.server.reaching import reach_server
from hpcsgd.server.rendezvous import Endpoint
from hpcsgd.server.strangers import Strangers

SERVER, OTHER = "127.0.0.1", "127.0.0.2"
LONGEST_CALL = 0.5  # seconds; each should take microseconds


class Place:
    """A server at one address, and another program, or nothing, at the same port of the other."""

    def __init__(self) -> None:
        listener, self.other = listen([SERVER, OTHER])
        self.port = listener.getsockname()[1]
        self.admitted: list[socket.socket] = []
        self.guests: list[socket.socket] = []
        self.strangers = Strangers(
            [listener], ServerIdentity("s"), lambda connection, name: self.admitted.append(connection)
        )

    def endpoint(self, *addresses: str) -> Endpoint:
        return Endpoint(list(addresses), self.port)

    def reach(self, greeting: Greeting, says: bytes | None = None) -> socket.socket:
        """Run the greeting while the server works, and the other program sends `says` to its guests."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            self.strangers.serve()
            if says is not None:
                self._talk(says)
            began = time.monotonic()
            try:
                next(greeting)
            except StopIteration as reached:
                connection: socket.socket = reached.value
                self.guests.append(connection)
                return connection
            assert time.monotonic() - began < LONGEST_CALL
        raise AssertionError("the server was not reached")

    def _talk(self, says: bytes) -> None:
        try:
            guest, _ = self.other.accept()
        except BlockingIOError:
            return
        guest.sendall(says)
        self.guests.append(guest)

    def close(self) -> None:
        self.strangers.close()
        for each in (self.other, *self.admitted, *self.guests):
            each.close()


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(reaching, "_STAGGER_CONNECTED", 0.2)
    place = Place()
    yield place
    place.close()


def test_address_at_which_nobody_listens_is_passed_over(place: Place) -> None:
    connection = place.reach(reach_server(place.endpoint("127.0.0.3", SERVER), "s"))
    assert connection.getpeername() == (SERVER, place.port)


@pytest.mark.parametrize("says", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" * 4, bytes(200)])
def test_other_programs_at_an_address_are_passed_over(place: Place, says: bytes | None) -> None:
    """They send nothing, or no greeting; None: the kernel connects, and nobody accepts."""
    connection = place.reach(reach_server(place.endpoint(OTHER, SERVER), "s"), says)
    assert connection.getpeername() == (SERVER, place.port)
    assert len(place.admitted) == 1


def test_address_without_a_way_does_not_block(place: Place) -> None:
    addresses = ("198.51.100.1", "2001:db8::1", ".no name", "n" * 70, "")
    connection = place.reach(reach_server(place.endpoint(*addresses, SERVER), "s"))
    assert connection.getpeername() == (SERVER, place.port)


def test_failure_names_all_addresses(place: Place) -> None:
    with pytest.raises(Disconnected, match=rf"127.0.0.3:{place.port}: .*refused; 127.0.0.4:{place.port}: "):
        place.reach(reach_server(place.endpoint("127.0.0.3", "127.0.0.4"), "s"))
    with pytest.raises(Disconnected, match="no address"):
        place.reach(reach_server(place.endpoint(), "s"))


def test_wrong_secret_is_an_error_of_its_own_once_all_addresses_have_failed(place: Place) -> None:
    with pytest.raises(SecretError, match=rf"{SERVER}:{place.port}: this client does not have the secret"):
        place.reach(reach_server(place.endpoint(SERVER, "127.0.0.3"), "another"))
    assert not place.admitted


def test_slow_server_has_one_connection_of_a_client(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is connected at once, by the kernel, and has time to answer before its next address is tried."""
    monkeypatch.setattr(reaching, "_STAGGER_CONNECTED", 60.0)
    greeting = reach_server(place.endpoint(OTHER, SERVER), "s")
    until = time.monotonic() + 2 * reaching._STAGGER
    while time.monotonic() < until:
        next(greeting)
        place.strangers.serve()
    assert len(place.strangers) == 0 and not place.admitted
    greeting.close()


def test_connection_to_itself_is_rejected(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP connects a port to itself if the client is assigned the port that it connects to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.5", 0))
        port = taken.getsockname()[1]
    make = socket.socket

    def with_that_port(*of: int) -> socket.socket:
        client = make(*of)
        client.bind(("127.0.0.5", port))
        return client

    monkeypatch.setattr(socket, "socket", with_that_port)
    with pytest.raises(Disconnected, match="no server listens there"):
        place.reach(reach_server(Endpoint(["127.0.0.5"], port), "s"))
