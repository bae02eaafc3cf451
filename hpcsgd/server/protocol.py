"""Links between a client and a server: messages of a head and, where it says so, the bytes of an array.

A link never waits: `pump` moves what can be moved. Nothing that comes from the other side is believed: a
head that makes no sense ends the link, and memory is only given for as many bytes as its party expects.
"""

from __future__ import annotations

import json
import math
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic

_MAGIC = b"hps1"
_FORMAT = struct.Struct("<4sBBHIIqqdqqq")
HEAD_BYTES = _FORMAT.size
NOTES = 4 * 2**20  # bytes of JSON, at most
_LEVELS = 10  # of lists and objects in it, at most
_LARGEST = 2**40  # number in a head


class Kind(IntEnum):
    """What a message is for."""

    CHALLENGE = 1  # the server's first word
    HELLO = 2  # who the client is, and what it knows of the model
    WELCOME = 3
    REFUSAL = 4  # the last word, with the reason
    PULL = 5  # what is the value?
    FILL = 6  # here is one, if there is none yet
    PUSH = 7
    PUSHPULL = 8
    REPLY = 9  # to the last four
    CLAIM = 10  # how many steps may I take?
    GRANT = 11
    OPTIONS = 12  # of the optimizer, for the pushes that follow
    BEAT = 13  # still here
    REST = 14  # no more pushes until further notice
    BYE = 15


#: What brings values; all else are notes and questions.
VALUES = (Kind.FILL, Kind.PUSH, Kind.PUSHPULL, Kind.REPLY)


LAST_WORDS = (Kind.BYE, Kind.REFUSAL)


class State(IntEnum):
    """What a reply says of what it answers."""

    DONE = 0
    EMPTY = 1  # there is no value yet
    LATE = 2  # the push was left out: others had stopped waiting for it
    UNREAD = 3  # its code says a difference to what is not known here: it must be pushed as it is
    MORE = 4  # it was one part, and this is what all have said together: the next part is waited for
    AGAIN = 5  # it must be pushed from its first part on, as one of so many


@dataclass(frozen=True)
class Head:
    """The fixed part of a message.

    Attributes
    ----------
    kind
        What it is for.
    shard
        The index of a shard, see `hpcsgd.server.store`.
    state
        Of a reply.
    round
        The number of the client's push of this shard, from 1.
    version
        How many updates the shard has had.
    weight
        Of how many gradients a push is the mean.
    steps, begun
        How many the client asks for or may take, or of a pull, whether it begins to push; how many all
        clients have begun.
    nbytes
        Of the body.
    part, terms
        Of a push in parts: which one, from 0, and of how many clients' pushes it shall be the sum.
    """

    kind: Kind
    shard: int = 0
    state: State = State.DONE
    round: int = 0
    version: int = 0
    weight: float = 0.0
    steps: int = 0
    begun: int = 0
    nbytes: int = 0
    part: int = 0
    terms: int = 0

    def pack(self) -> bytes:
        rest = (self.round, self.version, self.weight, self.steps, self.begun, self.nbytes)
        return _FORMAT.pack(_MAGIC, self.kind, self.state, self.part, self.shard, self.terms, *rest)

    @staticmethod
    def unpack(data: bytes | bytearray | memoryview) -> Head:
        """Raises `Malformed` for what `pack` cannot have made."""
        magic, kind, state, part, shard, terms, *rest = _FORMAT.unpack(data)
        number, version, weight, steps, begun, nbytes = rest
        numbers = (number, version, steps, begun, nbytes)
        try:
            if magic != _MAGIC or not 0 <= min(numbers) <= max(numbers) <= _LARGEST:
                raise ValueError
            if not 0 <= weight < math.inf:
                raise ValueError
            fixed = (Kind(kind), shard, State(state), number, version, weight, steps, begun, nbytes)
            return Head(*fixed, part, terms)
        except ValueError:
            raise Malformed("it sent something that is no message of hpcsgd") from None


class Lost(Exception):
    """The other side is gone; the text says how that was noticed."""


class Malformed(Lost):
    """It sent what it must not send."""


class Party(Protocol):
    """Who uses a link."""

    def landing(self, link: Link, head: Head) -> np.ndarray:
        """Memory for the body of a message, `head.nbytes` of uint8; raises `Malformed` where none is due."""

    def take(self, link: Link, head: Head, body: np.ndarray) -> None:
        """A message is here; raises `Malformed` for one that makes no sense."""


class Link:
    """One side of a link.

    Parameters
    ----------
    party
        Takes the messages.
    name
        What the other side is called, for errors.
    traffic
        Where to count the values that are sent; None: nowhere.

    Attributes
    ----------
    heard
        When something came last, by `time.monotonic`.
    received, sent
        Bytes of messages.
    lasting
        Whether there is no other one between its two sides, ever.
    """

    lasting = False

    def __init__(self, party: Party, name: str, traffic: Traffic | None = None) -> None:
        self.party, self.name, self._traffic = party, name, traffic
        self.heard = time.monotonic()
        self.received = self.sent = 0
        self._head: Head | None = None
        self._body = np.empty(0, np.uint8)

    def send(self, head: Head, body: np.ndarray | None = None, plain: int | None = None) -> None:
        """Queue a message; the body must stay unchanged until it has left.

        Parameters
        ----------
        head, body
            The message.
        plain
            Of a code: the bytes of the values that are not sent because of it.
        """
        self.sent += HEAD_BYTES + head.nbytes
        if self._traffic is not None and head.kind in VALUES:
            self._traffic.sent += head.nbytes
            self._traffic.saved += 0 if plain is None else plain - head.nbytes
        self._queue(head, body if head.nbytes else None)

    def _queue(self, head: Head, body: np.ndarray | None) -> None:
        raise NotImplementedError

    def pump(self) -> bool:
        """Move what can be moved; returns whether anything was. Raises `Lost`."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send what can be sent now, and receive nothing: the last word before the end."""

    @property
    def idle(self) -> bool:
        """Whether all that was queued has left."""
        raise NotImplementedError

    def close(self) -> None:
        """Neither send nor receive any more."""
        raise NotImplementedError

    def send_note(self, kind: Kind, note: dict[str, Any]) -> None:
        """Queue a message whose body is JSON."""
        body = as_note(note)
        self.send(Head(kind, nbytes=body.size), body)

    def _expect(self, data: bytes | bytearray | memoryview) -> tuple[Head, np.ndarray]:
        """A head is here; returns it, and where its body goes."""
        self.heard = time.monotonic()
        head = Head.unpack(data)
        body = self.party.landing(self, head) if head.nbytes else np.empty(0, np.uint8)
        if body.nbytes != head.nbytes:
            raise Malformed(f"it sent {head.nbytes} bytes where {body.nbytes} were expected")
        return head, body

    def _hand_over(self, head: Head, body: np.ndarray) -> None:
        """A message is here."""
        self.heard = time.monotonic()
        self.received += HEAD_BYTES + head.nbytes
        self.party.take(self, head, body)

    # Where messages come one after the other.

    def _begin(self, data: bytes | bytearray | memoryview) -> np.ndarray:
        """A head is here; returns where its body goes."""
        self._head, self._body = self._expect(data)
        return self._body

    def _end(self) -> None:
        """Its body is here too."""
        head, body, self._head = self._head, self._body, None
        assert head is not None
        self._hand_over(head, body)


def as_note(note: dict[str, Any]) -> np.ndarray:
    """JSON, as a body."""
    return np.frombuffer(json.dumps(note).encode(), np.uint8)


def read_note(body: np.ndarray) -> dict[str, Any]:
    """The JSON of a body."""
    try:
        note = json.loads(body.tobytes())
    except (ValueError, RecursionError):
        note = None
    if not isinstance(note, dict) or not _flat(note, _LEVELS):
        raise Malformed("it sent a note that cannot be read")
    return note


def _flat(value: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other no deeper than that: who walks through them may recurse."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_flat(each, levels - 1) for each in inner)
