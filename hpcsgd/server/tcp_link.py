"""Links between separate jobs: over TCP, found by a file, opened by who knows the secret in it."""

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
from hpcsgd.server.protocol import HEAD_BYTES, Head, Link, Lost, Party

_SIOCGIFADDR = 0x8915
_AT_ONCE = 8 * 2**20  # bytes of one link, before others have their turn
_ATTEMPT = 2.0  # seconds for an address to answer
_NONCE = 32  # bytes
_UNHEARD = 30_000  # milliseconds without an acknowledgement by the other host, until it is taken for dead


@dataclass
class Meeting:
    """What a file says of the servers of a job.

    Attributes
    ----------
    secret
        Only who knows it is let in.
    servers
        For each server the addresses at which it may be reached, and its port.
    """

    secret: str
    servers: list[tuple[list[str], int]]

    def write(self, path: Path) -> None:
        """Make the file, for its owner alone; whole or not at all."""
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(self), file)
        os.replace(aside, path)

    @staticmethod
    def read(path: Path) -> Meeting:
        """Raises `HpcsgdError` for a file that is not one, `OSError` where there is none."""
        text = path.read_text(errors="replace")
        try:
            found = json.loads(text)
            servers = [([str(a) for a in addresses], int(port)) for addresses, port in found["servers"]]
            if not all(0 < port < 2**16 for _, port in servers):
                raise ValueError
            return Meeting(str(found["secret"]), servers)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise HpcsgdError(
                f"{path} is not a file of `hpcsgd serve --listen`", got=text[:80], do="name the right one"
            ) from None


def new_secret() -> str:
    return secrets.token_hex(_NONCE)


def proof(secret: str, nonce: str) -> str:
    """What only who knows the secret can make of a nonce."""
    return hmac.digest(secret.encode(), nonce.encode(errors="surrogatepass"), "sha256").hex()


def proves(secret: str, nonce: str, given: object) -> bool:
    if not isinstance(given, str):
        return False
    return hmac.compare_digest(proof(secret, nonce).encode(), given.encode(errors="surrogatepass"))


def listen(address: str = "") -> socket.socket:
    """A socket that others can connect to, on a free port."""
    listener = socket.create_server((address, 0), backlog=128)
    listener.setblocking(False)
    return listener


def addresses() -> list[str]:
    """The IPv4 addresses of this host, those that others can reach first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return sorted(found, key=lambda address: address.startswith("127."))


def connect(hosts: list[str], port: int) -> socket.socket:
    """Connect to the first address that answers; raises `OSError` where none does."""
    errors = []
    for host in hosts:
        try:
            connection = socket.create_connection((host, port), timeout=_ATTEMPT)
        except OSError as error:
            errors.append(f"{host}:{port}: {error}")
            continue
        if connection.getsockname() != connection.getpeername():
            return connection
        # Where nobody listens, a host may by chance connect to itself.
        connection.close()
        errors.append(f"{host}:{port}: nobody is there")
    raise OSError("; ".join(errors))


class SocketLink(Link):
    """A link over TCP.

    Parameters
    ----------
    connection
        A connected socket, which is the link's from now on.
    party, name, traffic
        See `Link`.
    """

    def __init__(
        self, connection: socket.socket, party: Party, name: str, traffic: Traffic | None = None
    ) -> None:
        super().__init__(party, name, traffic)
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNHEARD)
        self._socket = connection
        self._leaving: deque[memoryview] = deque()
        self._buffer = bytearray(HEAD_BYTES)
        self._space = memoryview(self._buffer)  # what is yet to come of a head or body

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def _queue(self, head: Head, body: np.ndarray | None) -> None:
        self._leaving.append(memoryview(head.pack()))
        if body is not None:
            self._leaving.append(memoryview(body))  # type: ignore[arg-type]

    def pump(self) -> bool:
        moved = self._push_out()
        return self._take_in() or moved

    def flush(self) -> None:
        with contextlib.suppress(Lost):
            self._push_out()

    def _push_out(self) -> bool:
        moved = 0
        while self._leaving and moved < _AT_ONCE:
            try:
                count = self._socket.send(self._leaving[0])
            except BlockingIOError:
                break
            except OSError as error:
                raise _broken(error) from None
            moved += count
            if count == len(self._leaving[0]):
                self._leaving.popleft()
            else:
                self._leaving[0] = self._leaving[0][count:]
        return moved > 0

    def _take_in(self) -> bool:
        moved = 0
        while moved < _AT_ONCE:
            try:
                count = self._socket.recv_into(self._space)
            except BlockingIOError:
                break
            except OSError as error:
                raise _broken(error) from None
            if count == 0:
                raise Lost("it closed the connection")
            self.heard = time.monotonic()
            moved += count
            self._space = self._space[count:]
            if not self._space:
                self._arrived()
        return moved > 0

    def _arrived(self) -> None:
        if self._head is None:
            body = self._begin(self._buffer)
            if body.size:
                self._space = memoryview(body)  # type: ignore[arg-type]
                return
        self._space = memoryview(self._buffer)
        self._end()

    @property
    def idle(self) -> bool:
        return not self._leaving

    def close(self) -> None:
        self._socket.close()


def _broken(error: OSError) -> Lost:
    return Lost(f"the connection broke: {error.strerror or error}")
