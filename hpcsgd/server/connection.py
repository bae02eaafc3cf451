"""A client's connection to one server, which outlives the links it is made of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.progress import LISTENING
from hpcsgd.server import tcp_link
from hpcsgd.server.protocol import NOTES, Head, Kind, Link, Lost, Malformed, Party, as_note, read_note

_AGAIN = 0.3  # seconds between two attempts to reach a server
_BEATS = 4  # in a lease
_CLOSED = 60.0


class Dial(Protocol):
    """How a server is reached.

    Attributes
    ----------
    server
        What it is called, for errors.
    """

    server: str

    def open(self, party: Party) -> tuple[Link, str]:
        """A new link to it, and the secret of its job; raises `OSError` where it cannot be had now."""


@dataclass
class Request:
    """Something asked of a server.

    Attributes
    ----------
    head
        What is sent,
    source
        with these bytes, if any;
    target
        where the answer's bytes go, if any;
    coded
        or where they go if they are a code, of another size;
    answer
        and its head, when it is here.
    """

    head: Head
    source: np.ndarray | None = None
    target: np.ndarray | None = None
    coded: np.ndarray | None = None
    answer: Head | None = None

    @property
    def done(self) -> bool:
        """Whether the answer is here."""
        return self.answer is not None


class Connection:
    """Asks one server, and asks again where the link broke before an answer was here.

    Parameters
    ----------
    dial
        Opens links.
    hello
        What the server must know before it lets this client in.
    patience
        Seconds in which a server that went away must be back.
    """

    def __init__(self, dial: Dial, hello: Callable[[], dict[str, Any]], patience: float) -> None:
        self._dial, self._hello, self._patience = dial, hello, patience
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._secret, self._nonce = "", ""
        self._welcome = self._closing = self._closed = False
        self._asked: dict[tuple[bool, int], Request] = {}
        self._told: dict[Kind, tuple[Head, np.ndarray | None]] = {}
        self._gone_since, self._why = time.monotonic(), "no answer"
        self._again_at = self._beat_at = 0.0
        self._between_beats = _CLOSED

    def ask(self, request: Request) -> None:
        """Send a request; one of a shard at a time."""
        with self._lock:
            self._asked[_slot(request.head)] = request
            if request.head.round or request.head.steps:
                self._told.pop(Kind.REST, None)
            self._send(request.head, request.source)

    def tell(self, head: Head, body: np.ndarray | None = None) -> None:
        """Send what has no answer: again over the next link, unless another of its kind has followed."""
        with self._lock:
            self._told[head.kind] = head, body
            self._send(head, body)

    def tell_note(self, kind: Kind, note: dict[str, Any]) -> None:
        """Likewise with a note."""
        body = as_note(note)
        self.tell(Head(kind, nbytes=body.size), body)

    def say_goodbye(self) -> None:
        """Ask to be let go; `closed` when that was heard, or nobody hears it."""
        with self._lock:
            self._closing = True
            self._send(Head(Kind.BYE))
            if not self._welcome:
                self._drop("it was not waited for")

    @property
    def closed(self) -> bool:
        return self._closed

    def pump(self) -> float:
        """Do what can be done now; returns the seconds until it should be called again, see `Service`."""
        with self._lock:
            if self._closed:
                return _CLOSED
            if self._link is None:
                self._open()
            if not self._welcome:
                self._check_patience()
            if self._link is None:
                return _AGAIN
            try:
                moved = self._link.pump()
            except Lost as error:
                self._drop(str(error))
                return 0.0
            now = time.monotonic()
            if self._welcome and not self._closing and now >= self._beat_at:
                self._beat_at = now + self._between_beats
                self._link.send(Head(Kind.BEAT))
            busy = self._asked or not self._welcome or not self._link.idle or self._closing
            return 0.0 if moved else LISTENING if busy else max(0.0, self._beat_at - now)

    def _open(self) -> None:
        if time.monotonic() < self._again_at:
            return
        try:
            self._link, self._secret = self._dial.open(self)
        except OSError as error:
            self._drop(str(error))

    def _check_patience(self) -> None:
        if time.monotonic() - self._gone_since > self._patience:
            raise HpcsgdError(
                f"{self._dial.server} cannot be reached for {self._patience:g} s",
                got=self._why,
                do="start the server (again); for a longer wait raise --timeout or HPCSGD_TIMEOUT (s)",
            )

    def _drop(self, why: str) -> None:
        if self._link is not None:
            self._link.close()
        now = time.monotonic()
        if self._welcome:
            self._gone_since = now
        self._link, self._welcome, self._why = None, False, why
        self._closed = self._closing
        self._again_at = now + _AGAIN

    def _send(self, head: Head, body: np.ndarray | None = None) -> None:
        if self._link is not None and self._welcome:
            self._link.send(head, body)

    def landing(self, link: Link, head: Head) -> np.ndarray:
        """See `links.Party`."""
        if head.kind is Kind.REPLY:
            request = self._asked.get(_slot(head))
            if request is None or request.target is None:
                raise Malformed("it answered what nobody had asked")
            coded = request.coded
            return coded if coded is not None and coded.nbytes == head.nbytes else request.target
        if head.nbytes > NOTES:
            raise Malformed(f"it sent a note of {head.nbytes} bytes")
        return np.empty(head.nbytes, np.uint8)

    def take(self, link: Link, head: Head, body: np.ndarray) -> None:
        """See `links.Party`."""
        if head.kind in (Kind.REPLY, Kind.GRANT):
            request = self._asked.pop(_slot(head), None)
            if request is None:
                raise Malformed("it answered what nobody had asked")
            request.answer = head
        elif head.kind is Kind.CHALLENGE:
            self._nonce = tcp_link.new_secret()
            nonce = str(read_note(body).get("nonce"))
            proof = tcp_link.proof(self._secret, nonce)
            link.send_note(Kind.HELLO, {**self._hello(), "nonce": self._nonce, "proof": proof})
        elif head.kind is Kind.WELCOME:
            self._enter(read_note(body))
        elif head.kind is Kind.REFUSAL:
            self._refused(str(read_note(body).get("reason")))
        elif head.kind is Kind.BYE:
            raise Lost("it said goodbye")
        else:
            raise Malformed(f"it sent a {head.kind.name}")

    def _enter(self, note: dict[str, Any]) -> None:
        if not tcp_link.proves(self._secret, self._nonce, note.get("proof")):
            self._refused("the server does not know the secret of this job")
        lease = note.get("lease")
        if not isinstance(lease, int | float) or not lease > 0:
            raise Malformed("it did not say how long a client may be silent")
        self._welcome, self._between_beats = True, lease / _BEATS
        for head, body in self._told.values():
            self._send(head, body)
        for request in self._asked.values():
            self._send(request.head, request.source)

    def _refused(self, reason: str) -> None:
        raise HpcsgdError(
            f"{self._dial.server} does not let this group in",
            got=reason,
            do="start server and groups with the same versions, model and options, and the server's own file",
        )


def _slot(head: Head) -> tuple[bool, int]:
    return head.kind in (Kind.CLAIM, Kind.GRANT), head.shard
