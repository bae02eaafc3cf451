"""TCP links between separate jobs; a rendezvous file holds the addresses and the secret of the servers."""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import secrets
import socket
import struct
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import HpcsgdError
from hpcsgd.server.protocol import HEADER_BYTES, Disconnected, Handler, Header, Link

_SIOCGIFADDR = 0x8915
_MAX_BYTES_PER_PUMP = 8 * 2**20  # of one link, then the others are served
_CONNECT_TIMEOUT = 2.0  # seconds, for each address
_NONCE_BYTES = 32
_USER_TIMEOUT_MS = 30_000  # without an acknowledgement by the other host, then the connection is broken


@dataclass
class RendezvousFile:
    """Addresses of the servers of a job and the secret by which groups authenticate, in a file.

    Attributes
    ----------
    secret
        Key of the HMACs by which clients and servers authenticate each other.
    servers
        For each server the addresses at which it may be reached, and its port.
    """

    secret: str
    servers: list[tuple[list[str], int]]

    def write(self, path: Path) -> None:
        """Write the file atomically, readable by its owner only."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)
        os.replace(partial, path)

    @staticmethod
    def read(path: Path) -> RendezvousFile:
        """Raises `HpcsgdError` for a file of another kind, `OSError` for one that cannot be read."""
        text = path.read_text(errors="replace")
        try:
            found = json.loads(text)
            servers = [([str(a) for a in addresses], int(port)) for addresses, port in found["servers"]]
            if not all(0 < port < 2**16 for _, port in servers):
                raise ValueError
            return RendezvousFile(str(found["secret"]), servers)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise HpcsgdError(
                f"{path} is not a file of `hpcsgd serve --listen`",
                got=text[:80],
                do="pass to --connect the file that the servers write: hpcsgd serve --listen FILE",
            ) from None


def new_secret() -> str:
    """Random secret or nonce, as hexadecimal text."""
    return secrets.token_hex(_NONCE_BYTES)


def hmac_response(secret: str, nonce: str) -> str:
    """HMAC-SHA256 of a nonce under the secret, in hexadecimal."""
    return hmac.digest(secret.encode(), nonce.encode(errors="surrogatepass"), "sha256").hex()


def verify(secret: str, nonce: str, response: object) -> bool:
    """Whether `response` is the HMAC of the nonce; in constant time."""
    if not isinstance(response, str):
        return False
    return hmac.compare_digest(hmac_response(secret, nonce).encode(), response.encode(errors="surrogatepass"))


def listen(address: str = "") -> socket.socket:
    """Listening socket on a free port."""
    listener = socket.create_server((address, 0), backlog=128)
    listener.setblocking(False)
    return listener


def addresses() -> list[str]:
    """IPv4 addresses of this host, the loopback last."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found.append(socket.inet_ntoa(reply[20:24]))
    return sorted(found, key=lambda address: address.startswith("127."))


def connect(hosts: list[str], port: int) -> socket.socket:
    """Connect to the first address that accepts; raises `OSError` if none does."""
    errors = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT)
        except OSError as error:
            errors.append(f"{host}:{port}: {error}")
            continue
        if connection.getsockname() != connection.getpeername():
            return connection
        # With no listener on the port, a host may by chance connect to itself.
        connection.close()
        errors.append(f"{host}:{port}: no server listens there")
    raise OSError("; ".join(errors))


class TCPLink(Link):
    """Link over TCP.

    Parameters
    ----------
    connection
        A connected socket, which the link owns and closes.
    handler, name, traffic
        See `Link`.
    """

    def __init__(
        self, connection: socket.socket, handler: Handler, name: str, traffic: Traffic | None = None
    ) -> None:
        super().__init__(handler, name, traffic)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        self._socket = connection
        self._outgoing: deque[memoryview] = deque()
        self._buffer = bytearray(HEADER_BYTES)
        self._unfilled = memoryview(self._buffer)  # rest of the header or body that is being received

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def _queue(self, header: Header, body: np.ndarray | None) -> None:
        self._outgoing.append(memoryview(header.pack()))
        if body is not None:
            self._outgoing.append(memoryview(body))  # type: ignore[arg-type]

    def pump(self) -> bool:
        moved = self._send_pending()
        return self._receive() or moved

    def flush(self) -> None:
        with contextlib.suppress(Disconnected):
            self._send_pending()

    def _send_pending(self) -> bool:
        moved = 0
        while self._outgoing and moved < _MAX_BYTES_PER_PUMP:
            try:
                count = self._socket.send(self._outgoing[0])
            except BlockingIOError:
                break
            except OSError as error:
                raise _connection_error(error) from None
            moved += count
            if count == len(self._outgoing[0]):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = self._outgoing[0][count:]
        return moved > 0

    def _receive(self) -> bool:
        moved = 0
        while moved < _MAX_BYTES_PER_PUMP:
            try:
                count = self._socket.recv_into(self._unfilled)
            except BlockingIOError:
                break
            except OSError as error:
                raise _connection_error(error) from None
            if count == 0:
                raise Disconnected("the other side closed the connection")
            self.last_received = time.monotonic()
            moved += count
            self._unfilled = self._unfilled[count:]
            if not self._unfilled:
                self._on_filled()
        return moved > 0

    def _on_filled(self) -> None:
        if self._header is None:
            body = self._begin_message(self._buffer)
            if body.size:
                self._unfilled = memoryview(body)  # type: ignore[arg-type]
                return
        self._unfilled = memoryview(self._buffer)
        self._end_message()

    @property
    def idle(self) -> bool:
        return not self._outgoing

    def close(self) -> None:
        self._socket.close()


def _connection_error(error: OSError) -> Disconnected:
    return Disconnected(f"the connection broke: {error.strerror or error}")
