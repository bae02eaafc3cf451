"""Codes of several clients that a server sums as words, without decoding any of them.

The clients run the codecs of one reduction, whose messages they send to the server as parts of a push. For
each part the server waits until all have said theirs, combines them, and tells them all. It runs a codec too,
on zeros, which hears only the combinations and so ends with the sum. What it says itself is what a client
without a gradient would: it stands for clients that have gone meanwhile, or that have nothing to add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress import Codec, Draw, Message
from hpcsgd.compress.base import finite
from hpcsgd.compress.point_to_point import Coder, bytes_of

_OPERATIONS = {"max": np.maximum, "and": np.bitwise_and}


class ClientSum:
    """A client's pushes of one shard.

    Parameters
    ----------
    coder
        Of the shard.
    residual
        What has not been said, or None.

    Attributes
    ----------
    terms
        For how many clients it speaks as one.
    part
        Which message was said last.
    """

    def __init__(self, coder: Coder, residual: Tensor | None) -> None:
        self._coder, self._residual = coder, residual
        self.terms = self.part = 0
        self._rest: Tensor | None = None
        self._tell(1)
        self._last = sum(1 for _ in _messages(self._codec, coder.zeros(), Draw(0, 0, 0, 0), None)) - 1

    def _tell(self, terms: int) -> None:
        if terms != self.terms:
            self.terms, self._codec = terms, self._coder.codec(terms)

    def begin(self, values: Tensor, draw: Draw, terms: int) -> np.ndarray | None:
        """The first part of a push of values, which are overwritten; None: a number is not finite."""
        self._tell(terms)
        self._rest = None if self._residual is None else self._residual.clone()
        self._run, self.part = _messages(self._codec, values, draw, self._rest, 1 / terms), 0
        self._message = next(self._run)
        return bytes_of(self._message.data).copy() if finite(self._message.data) else None

    @property
    def combined_bytes(self) -> int:
        """Of the combination of this part; 0: it was the last, and the server alone hears that."""
        return 0 if self.part == self._last else _combined(self._message).nbytes

    def go_on(self, combination: np.ndarray) -> np.ndarray:
        """The next part, once all have heard the combination of the last one."""
        bytes_of(_combined(self._message))[:] = combination
        self._message, self.part = next(self._run), self.part + 1
        return bytes_of(self._message.data).copy()

    def end(self, counted: bool) -> None:
        """The push is over; what it did not say is kept if it was counted in."""
        rest, self._rest = self._rest, None
        if counted and self._residual is not None and rest is not None:
            for _ in self._run:  # some schemes note only now what they have not said
                pass
            self._residual.copy_(rest)


class ServerSum:
    """A server's sum of one push of all clients.

    Parameters
    ----------
    coder
        Of the shard.

    Attributes
    ----------
    members
        Who is summed up; empty between two sums.
    part
        Which message they are to say.
    terms
        How many they were when the sum was begun.
    """

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        self._sizes: dict[int, list[int]] = {}
        self.terms, self._codec = 1, coder.codec(1)
        self.members: set[str] = set()
        self.part = 0

    def sizes(self, terms: int) -> list[int]:
        """Bytes of each part of a push for so many terms."""
        if terms not in self._sizes:
            codec, zeros = self._coder.codec(terms), self._coder.zeros()
            messages = _messages(codec, zeros, Draw(0, 0, 0, 0), None)
            self._sizes[terms] = [message.data.nbytes for message in messages]
        return self._sizes[terms]

    def takes(self, client: str, part: int) -> bool:
        """Whether this is the part that a client may say now; any may begin, for the next sum."""
        if part == 0:
            self.members.discard(client)
            return True
        return client in self.members and part == self.part

    def fits(self, nbytes: int, part: int, terms: int) -> bool:
        """Whether a part has as many bytes as it should."""
        sizes = self.sizes(terms)
        return part < len(sizes) and nbytes == sizes[part]

    def begin(self, clients: Sequence[str], draw: Draw) -> None:
        """Sum up what these are about to say."""
        self.members, self.part = set(clients), 0
        if len(clients) != self.terms:
            self.terms, self._codec = len(clients), self._coder.codec(len(clients))
        self._values = self._coder.zeros()
        self._run = _messages(self._codec, self._values, draw, self._coder.nothing_kept(), 1 / self.terms)
        self._message = next(self._run)

    def combine(self, said: Sequence[np.ndarray]) -> np.ndarray | None:
        """The combination of what the members have said, in their order; None: it was the last part."""
        message, missing = self._message, self.terms - len(said)
        own = message.data
        parts = [torch.from_numpy(part).view(own.dtype) for part in said]
        if message.gathered is not None:
            message.gathered.copy_(torch.stack([*parts, *[own] * missing]))
        elif message.op == "sum" and own.is_floating_point():
            for part in parts:
                own += part
        elif message.op == "sum":
            words = _unsigned(own)
            words *= words.dtype.type(missing)
            for part in parts:
                words += _unsigned(part)
        else:
            words = _unsigned(own)
            for part in parts:
                _OPERATIONS[message.op](words, _unsigned(part), out=words)
        combination = bytes_of(_combined(message)).copy()
        following = next(self._run, None)
        if following is None:
            return None
        self._message, self.part = following, self.part + 1
        return combination

    def end(self, weight: float) -> Tensor:
        """The sum, after its last part, divided by what those who have said it count."""
        self.members = set()
        return self._values.mul_(self.terms / weight)


def _messages(
    codec: Codec, values: Tensor, draw: Draw, residual: Tensor | None, scale: float = 1.0
) -> Iterator[Message]:
    buffers = [torch.zeros(numel, dtype=dtype) for numel, dtype in codec.sums]
    run = codec.run(values, buffers, draw, scale, residual)
    return (message for message in run if message is not None)


def _combined(message: Message) -> Tensor:
    return message.data if message.gathered is None else message.gathered


def _unsigned(words: Tensor) -> np.ndarray:
    """As whole numbers without a sign, which wrap around."""
    numbers: np.ndarray = words.numpy().view({2: np.uint16, 4: np.uint32, 8: np.uint64}[words.element_size()])
    return numbers
