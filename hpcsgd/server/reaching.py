"""A client's way to a server that has several addresses, not all of which need lead there."""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time

from hpcsgd.server.proof import Greeting, SecretError, greet_server
from hpcsgd.server.protocol import Disconnected
from hpcsgd.server.rendezvous import Endpoint

# Seconds that an address has for itself, then the next one is tried beside it: until it is connected, and
# then until it has answered, for a server may be busy.
_STAGGER, _STAGGER_CONNECTED = 0.3, 3.0
_CONNECT_TIMEOUT = 5.0  # seconds, for each address
_GREETING_TIMEOUT = 10.0  # seconds, from the connection to the proof
_UNDER_WAY = (errno.EINPROGRESS, errno.EALREADY)


def reach_server(endpoint: Endpoint, secret: str) -> Greeting:
    """Connection to the first address at which the server proves the secret; never blocks.

    The addresses are tried in their order, the next one when all earlier ones have failed or are slow (after
    RFC 8305, "happy eyeballs").

    Raises
    ------
    Disconnected
        If no address leads to the server; `SecretError` if a program answers at one that does not have the
        secret.
    """
    waiting, failures = list(dict.fromkeys(endpoint.addresses)), dict[str, Disconnected]()
    attempts: dict[str, _Attempt] = {}
    last_began = 0.0
    try:
        while waiting or attempts:
            connected = any(attempt.connected for attempt in attempts.values())
            stagger = _STAGGER_CONNECTED if connected else _STAGGER
            if waiting and (not attempts or time.monotonic() - last_began > stagger):
                address, last_began = waiting.pop(0), time.monotonic()
                attempts[address] = _Attempt(address, endpoint, secret)
            for address, attempt in list(attempts.items()):
                try:
                    next(attempt.greeting)
                except StopIteration as reached:
                    del attempts[address]
                    connection: socket.socket = reached.value
                    return connection
                except Disconnected as error:
                    del attempts[address]
                    failures[address] = error
            yield selectors.EVENT_READ
    finally:
        for attempt in attempts.values():
            attempt.greeting.close()
    reasons = "; ".join(f"{address}:{endpoint.port}: {error}" for address, error in failures.items())
    if any(isinstance(error, SecretError) for error in failures.values()):
        raise SecretError(reasons)
    raise Disconnected(reasons or "the server has no address")


class _Attempt:
    """Connection to one address, and the greeting over it."""

    def __init__(self, address: str, endpoint: Endpoint, secret: str) -> None:
        self.connected = False
        self.greeting = self._run(address, endpoint, secret)

    def _run(self, address: str, endpoint: Endpoint, secret: str) -> Greeting:
        connection = yield from self._connect(address, endpoint.port)
        self.connected = True
        greeting = greet_server(connection, secret, endpoint.fingerprint)
        started = time.monotonic()
        try:
            while time.monotonic() - started < _GREETING_TIMEOUT:
                try:
                    event = next(greeting)
                except StopIteration as done:
                    greeted: socket.socket = done.value
                    return greeted
                yield event
        finally:
            greeting.close()
        connection.close()  # a greeting that has not begun closes nothing
        raise Disconnected(f"the server has not answered for {_GREETING_TIMEOUT:g} s")

    @staticmethod
    def _connect(address: str, port: int) -> Greeting:
        connection: socket.socket | None = None
        try:
            family, kind, _, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            connection, started = socket.socket(family, kind), time.monotonic()
            connection.setblocking(False)
            while (code := connection.connect_ex(target)) in _UNDER_WAY:
                if time.monotonic() - started > _CONNECT_TIMEOUT:
                    raise TimeoutError(f"no connection within {_CONNECT_TIMEOUT:g} s")
                yield selectors.EVENT_WRITE
            if code not in (0, errno.EISCONN):
                raise OSError(code, os.strerror(code))
            if connection.getsockname() == connection.getpeername():
                # With no listener on the port, a host may by chance connect to itself.
                raise ConnectionRefusedError("no server listens there")
            return connection
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, OSError | UnicodeError):  # names that cannot be resolved or encoded
                raise Disconnected(getattr(error, "strerror", "") or str(error)) from None
            raise
