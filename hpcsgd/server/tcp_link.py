"""Links over TCP between separate jobs."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections import deque
from collections.abc import Generator

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.server.proof import Greeting
from hpcsgd.server.protocol import HEADER_BYTES, Disconnected, Handler, Header, Link, connection_broke

_MAX_BYTES_PER_PUMP = 8 * 2**20  # of one link, then the others are served
_USER_TIMEOUT_MS = 30_000  # without an acknowledgement by the other host, then the connection is broken
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class TCPLink(Link):
    """Link over TCP, which owns and closes its connection.

    That is a connected socket, whose other side has been greeted, or the greeting that leads to one.
    """

    def __init__(
        self,
        connection: socket.socket | Greeting,
        handler: Handler,
        name: str,
        traffic: Traffic | None = None,
    ) -> None:
        super().__init__(handler, name, traffic)
        self._greeting: Greeting | None = None
        if isinstance(connection, Generator):
            self._greeting = connection
        else:
            self._use(connection)
        self._outgoing: deque[memoryview] = deque()
        self._buffer = bytearray(HEADER_BYTES)
        self._unfilled = memoryview(self._buffer)  # rest of the header or body that is being received

    def _use(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
        self._socket, self._greeting = connection, None

    def fileno(self) -> int:
        """For `selectors`."""
        return self._socket.fileno()

    def _queue(self, header: Header, body: np.ndarray | None) -> None:
        self._outgoing.append(memoryview(header.pack()))
        if body is not None:
            self._outgoing.append(memoryview(body))  # type: ignore[arg-type]

    def pump(self) -> bool:
        if self._greeting is not None:
            return self._greet(self._greeting)
        moved = self._send_pending()
        return self._receive() or moved

    def _greet(self, greeting: Greeting) -> bool:
        """Continue the greeting; returns whether it has ended."""
        try:
            next(greeting)
        except StopIteration as done:
            self._use(done.value)
            return True
        return False

    def flush(self) -> None:
        if self._greeting is None:
            with contextlib.suppress(Disconnected):
                self._send_pending()

    def _send_pending(self) -> bool:
        moved = 0
        while self._outgoing and moved < _MAX_BYTES_PER_PUMP:
            try:
                count = self._socket.send(self._outgoing[0])
            except _WOULD_BLOCK:
                break
            except OSError as error:
                raise connection_broke(error) from None
            moved += count
            if count == len(self._outgoing[0]):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = self._outgoing[0][count:]
        return moved > 0

    def _receive(self) -> bool:
        moved = 0
        while moved < _MAX_BYTES_PER_PUMP or self._holds_bytes():
            try:
                count = self._socket.recv_into(self._unfilled)
            except _WOULD_BLOCK:
                break
            except OSError as error:
                raise connection_broke(error) from None
            if count == 0:
                raise Disconnected("the other side closed the connection")
            self.last_received = time.monotonic()
            moved += count
            self._unfilled = self._unfilled[count:]
            if not self._unfilled:
                self._on_filled()
        return moved > 0

    def _holds_bytes(self) -> bool:
        """Whether there are decrypted bytes, of which a selector knows nothing."""
        return isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0

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
        if self._greeting is not None:
            self._greeting.close()
        else:
            self._socket.close()
