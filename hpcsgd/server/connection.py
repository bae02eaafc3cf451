"""A client's connection to one server, over a succession of links."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.tasks import NEVER, POLL_INTERVAL, Steps
from hpcsgd.server.proof import SecretError
from hpcsgd.server.protocol import (
    MAX_JSON_BYTES,
    Disconnected,
    Handler,
    Header,
    Link,
    MessageType,
    ProtocolError,
    decode_json,
    encode_json,
)

_RETRY_INTERVAL = 0.3  # seconds between two attempts to reach a server
_HEARTBEATS_PER_LEASE = 4
_IDLE_INTERVAL = 60.0  # seconds between two calls of `pump` while nothing is due


class Connector(Protocol):
    """Opens links to one server.

    Attributes
    ----------
    server_name
        Name of the server, for errors.
    """

    server_name: str

    def open(self, handler: Handler) -> Link:
        """Open a link. Raises `OSError` if none can be opened now."""


@dataclass
class Request:
    """Request to a server.

    Attributes
    ----------
    header, source
        Header and body of the message; None: no body.
    target
        Memory for the body of the reply; None: it has none.
    coded_target
        Memory for the body of the reply if it is a code, which has another size.
    reply
        Header of the reply, once it has been received.
    """

    header: Header
    source: np.ndarray | None = None
    target: np.ndarray | None = None
    coded_target: np.ndarray | None = None
    reply: Header | None = None

    @property
    def done(self) -> bool:
        """Whether the reply has been received."""
        return self.reply is not None


class Connection:
    """Sends requests to one server, and repeats those whose link broke before the reply.

    Parameters
    ----------
    connector
        Opens links.
    hello
        Returns the fields of the hello message, with which the server decides whether to admit this client.
    timeout
        Seconds within which a lost link must be replaced.
    """

    def __init__(self, connector: Connector, hello: Callable[[], dict[str, Any]], timeout: float) -> None:
        self._connector, self._hello, self._timeout = connector, hello, timeout
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._admitted = self._was_admitted = self._closing = self._closed = self._abandoned = False
        self._pending: dict[tuple[bool, int], Request] = {}
        self._notifications: dict[MessageType, tuple[Header, np.ndarray | None]] = {}
        self._disconnected_at, self._reason = time.monotonic(), "no reply"
        self._retry_at = self._heartbeat_at = 0.0
        self._heartbeat_interval = _IDLE_INTERVAL

    def send_request(self, request: Request) -> None:
        """Send a request; each shard may have one at a time."""
        with self._lock:
            self._pending[_request_key(request.header)] = request
            if request.header.push_number or request.header.steps:
                self._notifications.pop(MessageType.PAUSE, None)
            self._send(request.header, request.source)

    def notify(self, header: Header, body: np.ndarray | None = None) -> None:
        """Send a message that has no reply; the last one of each type is sent again over a new link."""
        with self._lock:
            self._notifications[header.type] = header, body
            self._send(header, body)

    def notify_json(self, message_type: MessageType, fields: dict[str, Any]) -> None:
        """Like `notify`, with a body of JSON."""
        body = encode_json(fields)
        self.notify(Header(message_type, nbytes=body.size), body)

    def start_close(self) -> None:
        """Start to close the session; `closed` once the server has confirmed it, or cannot be reached."""
        with self._lock:
            self._closing = True
            self._send(Header(MessageType.GOODBYE))
            if not self._admitted:
                self._disconnect("the client has closed the connection")

    def abandon(self) -> None:
        """Stop without a message after the run was dropped; takes no lock: the garbage collector calls it."""
        self._abandoned = True

    @property
    def closed(self) -> bool:
        return self._closed

    def serve(self) -> Steps[None]:
        """Send and receive, until the connection is abandoned; a service."""
        while (pause := self.pump()) < NEVER:
            yield pause

    def pump(self) -> float:
        """Send and receive without blocking; returns the seconds until the next call, at the end `NEVER`."""
        with self._lock:
            if self._abandoned:
                if self._link is not None:
                    self._link.close()
                return NEVER
            if self._closed:
                return _IDLE_INTERVAL
            if self._link is None:
                self._open()
            moved = self._link is not None and self._pump(self._link)
            if not self._admitted and not self._closed:
                self._check_timeout()
            if self._link is None:
                return _IDLE_INTERVAL if self._closed else _RETRY_INTERVAL
            now = time.monotonic()
            if self._admitted and not self._closing and now >= self._heartbeat_at:
                self._heartbeat_at = now + self._heartbeat_interval
                self._link.send(Header(MessageType.HEARTBEAT))
            busy = self._pending or not self._admitted or not self._link.idle or self._closing
            return 0.0 if moved else POLL_INTERVAL if busy else max(0.0, self._heartbeat_at - now)

    def _pump(self, link: Link) -> bool:
        try:
            return bool(link.pump())
        except Disconnected as error:
            if isinstance(error, SecretError) and not self._was_admitted:
                raise HpcsgdError(
                    f"{self._connector.server_name} does not know this group",
                    got=str(error),
                    do="pass the file of the servers' --listen to --connect; if these have ended, and "
                    "another program has their port, remove the file and start them again",
                ) from None
            self._disconnect(str(error))
            return True

    def _open(self) -> None:
        if time.monotonic() < self._retry_at:
            return
        try:
            self._link = self._connector.open(self)
        except OSError as error:
            self._disconnect(str(error))
        else:
            self._link.send_json(MessageType.HELLO, self._hello())

    def _check_timeout(self) -> None:
        if time.monotonic() - self._disconnected_at > self._timeout:
            raise HpcsgdError(
                f"{self._connector.server_name} cannot be reached for {self._timeout:g} s",
                got=self._reason,
                do="start or restart the server, or see its output; to wait longer raise --timeout or "
                "HPCSGD_TIMEOUT (seconds)",
            )

    def _disconnect(self, reason: str) -> None:
        if self._link is not None:
            self._link.close()
        now = time.monotonic()
        if self._admitted:
            self._disconnected_at = now
        self._link, self._admitted, self._reason = None, False, reason
        self._closed = self._closing
        self._retry_at = now + _RETRY_INTERVAL

    def _send(self, header: Header, body: np.ndarray | None = None) -> None:
        if self._link is not None and self._admitted:
            self._link.send(header, body)

    def buffer_for(self, link: Link, header: Header) -> np.ndarray:
        """Return the memory for a reply's body: the target of its request."""
        if header.type is MessageType.REPLY:
            request = self._pending.get(_request_key(header))
            if request is None or request.target is None:
                raise ProtocolError("the server sent a reply without a request")
            coded = request.coded_target
            return coded if coded is not None and coded.nbytes == header.nbytes else request.target
        if header.nbytes > MAX_JSON_BYTES:
            raise ProtocolError(f"the server sent JSON of {header.nbytes} bytes")
        return np.empty(header.nbytes, np.uint8)

    def on_message(self, link: Link, header: Header, body: np.ndarray) -> None:
        """Handle a reply, a grant, or another message of the server."""
        if header.type in (MessageType.REPLY, MessageType.GRANT):
            request = self._pending.pop(_request_key(header), None)
            if request is None:
                raise ProtocolError("the server sent a reply without a request")
            request.reply = header
        elif header.type is MessageType.WELCOME:
            self._on_welcome(decode_json(body))
        elif header.type is MessageType.REFUSAL:
            self._raise_refused(str(decode_json(body).get("reason")))
        elif header.type is MessageType.GOODBYE:
            raise Disconnected("the server closed the session")
        else:
            raise ProtocolError(f"the server sent a {header.type.name}")

    def _on_welcome(self, fields: dict[str, Any]) -> None:
        lease = fields.get("lease")
        if not isinstance(lease, int | float) or not lease > 0:
            raise ProtocolError("the server's welcome message has no valid lease")
        self._admitted = self._was_admitted = True
        self._heartbeat_interval = lease / _HEARTBEATS_PER_LEASE
        for header, body in self._notifications.values():
            self._send(header, body)
        for request in self._pending.values():
            self._send(request.header, request.source)

    def _raise_refused(self, reason: str) -> None:
        raise HpcsgdError(
            f"{self._connector.server_name} does not admit this group",
            got=reason,
            do="start server and groups with the same versions, model and options, and pass the file of the "
            "server's --listen to --connect",
        )


def _request_key(header: Header) -> tuple[bool, int]:
    return header.type in (MessageType.CLAIM, MessageType.GRANT), header.shard
