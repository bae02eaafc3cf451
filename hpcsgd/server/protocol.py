"""Message protocol between a client and a server: fixed-size headers, and bodies of JSON or of array bytes.

A link never blocks: `Link.pump` moves the bytes that can be moved now. Received bytes are untrusted: a
malformed header ends the link, and memory is allocated only for the number of bytes that the handler expects.
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

_MAGIC = b"hps2"
_FORMAT = struct.Struct("<4sBBHIIqqdqqq")
HEADER_BYTES = _FORMAT.size
MAX_JSON_BYTES = 4 * 2**20
_MAX_DEPTH = 10  # of nested lists and objects in JSON
_MAX_NUMBER = 2**40  # in a header


class MessageType(IntEnum):
    """Types of messages; the number is the one on the wire."""

    HELLO = 1  # first message of the client: its identity and contract
    WELCOME = 2  # the client is admitted
    REFUSAL = 3  # last message, with the reason
    PULL = 4  # request for a shard's values
    INIT = 5  # values for a shard that has none yet
    PUSH = 6
    PUSHPULL = 7
    REPLY = 8  # to the four above
    CLAIM = 9  # request for a quota of steps
    GRANT = 10  # the quota
    OPTIONS = 11  # optimizer options for the following pushes
    HEARTBEAT = 12
    PAUSE = 13  # no pushes until the next one
    GOODBYE = 14


#: Types whose bodies are values of a shard; other bodies are JSON.
VALUE_TYPES = (MessageType.INIT, MessageType.PUSH, MessageType.PUSHPULL, MessageType.REPLY)


#: Types after which a side sends nothing more.
FINAL_TYPES = (MessageType.GOODBYE, MessageType.REFUSAL)


class ReplyStatus(IntEnum):
    """Result of a request, in the header of its reply."""

    OK = 0
    NO_VALUES = 1  # the shard has not been initialized
    LATE = 2  # the push was dropped: the others had stopped waiting for it
    NO_REFERENCE = 3  # the code is a difference to values that the server lacks: push the values themselves
    CONTINUE = 4  # one part of a code sum, with the combination of all clients' parts: send the next part
    RESTART = 5  # push again from the first part on, as one of `terms` clients


@dataclass(frozen=True)
class Header:
    """Fixed-size part of a message."""

    type: MessageType
    shard: int = 0  # index of a shard, see `hpcsgd.server.store`
    status: ReplyStatus = ReplyStatus.OK  # result, in a reply
    push_number: int = 0  # number of the client's push to this shard, from 1
    version: int = 0  # number of updates that the shard has had
    weight: float = 0.0  # number of gradients whose mean is pushed
    #: Steps that a client requests or is granted (in a pull: 1 if it will push); steps begun by all.
    steps: int = 0
    steps_begun: int = 0
    nbytes: int = 0
    #: In a code sum: the index of this part, from 0, and the number of clients whose pushes are summed.
    part: int = 0
    terms: int = 0

    def pack(self) -> bytes:
        rest = (self.push_number, self.version, self.weight, self.steps, self.steps_begun, self.nbytes)
        return _FORMAT.pack(_MAGIC, self.type, self.status, self.part, self.shard, self.terms, *rest)

    @staticmethod
    def unpack(data: bytes | bytearray | memoryview) -> Header:
        """Raises `ProtocolError` for bytes that `pack` cannot have produced."""
        magic, message_type, status, part, shard, terms, *rest = _FORMAT.unpack(data)
        number, version, weight, steps, steps_begun, nbytes = rest
        numbers = (number, version, steps, steps_begun, nbytes)
        try:
            if magic != _MAGIC or not 0 <= min(numbers) <= max(numbers) <= _MAX_NUMBER:
                raise ValueError
            if not 0 <= weight < math.inf:
                raise ValueError
            kinds = (MessageType(message_type), shard, ReplyStatus(status))
            return Header(*kinds, number, version, weight, steps, steps_begun, nbytes, part, terms)
        except ValueError:
            raise ProtocolError("received bytes that are no message of hpcsgd") from None


class Disconnected(Exception):
    """The link is lost; the text is the reason."""


class ProtocolError(Disconnected):
    """The other side violated the protocol."""


def connection_broke(error: OSError) -> Disconnected:
    """Loss of a link after an error of its socket."""
    return Disconnected(f"the connection broke: {error.strerror or error}")


class Handler(Protocol):
    """Receiver of a link's messages."""

    def buffer_for(self, link: Link, header: Header) -> np.ndarray:
        """Memory for a message's body, `header.nbytes` of uint8; raises `ProtocolError` if none is due."""

    def on_message(self, link: Link, header: Header, body: np.ndarray) -> None:
        """Handle a message; raises `ProtocolError` for an invalid one."""


class Link:
    """One end of a link.

    Parameters
    ----------
    handler
        Receives the messages.
    name
        Name of the other side, for errors.
    traffic
        Counts the values that are sent; None: they are not counted.

    Attributes
    ----------
    last_received
        Time of the last receipt, by `time.monotonic`.
    received, sent
        Bytes of messages.
    permanent
        Whether this is the only link that can ever exist between its two sides.
    """

    permanent = False

    def __init__(self, handler: Handler, name: str, traffic: Traffic | None = None) -> None:
        self.handler, self.name, self._traffic = handler, name, traffic
        self.last_received = time.monotonic()
        self.received = self.sent = 0
        self._header: Header | None = None
        self._body = np.empty(0, np.uint8)

    def send(self, header: Header, body: np.ndarray | None = None, dense_nbytes: int | None = None) -> None:
        """Queue a message; the body must stay unchanged until it has been sent.

        Parameters
        ----------
        header, body
            The message.
        dense_nbytes
            If the body is a code: the size of the values that it replaces.
        """
        self.sent += HEADER_BYTES + header.nbytes
        if self._traffic is not None and header.type in VALUE_TYPES:
            saved = 0 if dense_nbytes is None else dense_nbytes - header.nbytes
            self._traffic.count(sent=header.nbytes, saved=saved)
        self._queue(header, body if header.nbytes else None)

    def _queue(self, header: Header, body: np.ndarray | None) -> None:
        raise NotImplementedError

    def pump(self) -> bool:
        """Send and receive without blocking; returns whether anything moved. Raises `Disconnected`."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send without blocking, and receive nothing: for a final message."""

    @property
    def idle(self) -> bool:
        """Whether all queued messages have been sent."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop sending and receiving."""
        raise NotImplementedError

    def send_json(self, message_type: MessageType, fields: dict[str, Any]) -> None:
        """Queue a message whose body is JSON."""
        body = encode_json(fields)
        self.send(Header(message_type, nbytes=body.size), body)

    def _receive_header(self, data: bytes | bytearray | memoryview) -> tuple[Header, np.ndarray]:
        """Decode a header; returns it with the memory for its body."""
        self.last_received = time.monotonic()
        header = Header.unpack(data)
        body = self.handler.buffer_for(self, header) if header.nbytes else np.empty(0, np.uint8)
        if body.nbytes != header.nbytes:
            raise ProtocolError(f"received {header.nbytes} bytes where {body.nbytes} were expected")
        return header, body

    def _deliver(self, header: Header, body: np.ndarray) -> None:
        self.last_received = time.monotonic()
        self.received += HEADER_BYTES + header.nbytes
        self.handler.on_message(self, header, body)

    # For links that receive one message after the other.

    def _begin_message(self, data: bytes | bytearray | memoryview) -> np.ndarray:
        """Decode a header; returns the memory for its body."""
        self._header, self._body = self._receive_header(data)
        return self._body

    def _end_message(self) -> None:
        """Deliver the message, whose body is complete."""
        header, body, self._header = self._header, self._body, None
        assert header is not None
        self._deliver(header, body)


def encode_json(fields: dict[str, Any]) -> np.ndarray:
    """JSON as the body of a message."""
    return np.frombuffer(json.dumps(fields).encode(), np.uint8)


def decode_json(body: np.ndarray) -> dict[str, Any]:
    """JSON object in the body of a message; raises `ProtocolError` if there is none."""
    try:
        fields = json.loads(body.tobytes())
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or not _is_shallow(fields, _MAX_DEPTH):
        raise ProtocolError("received JSON that cannot be read")
    return fields


def _is_shallow(value: Any, depth: int) -> bool:
    """Whether lists and objects are nested at most `depth` levels: code that walks them may recurse."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(each, depth - 1) for each in inner)
