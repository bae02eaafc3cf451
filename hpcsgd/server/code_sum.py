"""Homomorphic sum of codes: a server sums the codes of several clients as words, without decoding any.

The clients run the codecs of one reduction and send its messages to the server as the parts of a push. The
server waits for a part of every client, combines them, and sends the combination to all. It runs a codec
itself, on zeros, which receives the combinations and so ends with the sum. Its own messages are those of a
client with a zero gradient: they replace the messages of clients that have left or have nothing to add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Message, RandomKey, all_finite
from hpcsgd.compress.point_to_point import PointToPointCodec, bytes_of

_OPERATIONS = {"max": np.maximum, "and": np.bitwise_and}


class CodeSumClient:
    """Client side of the code sums of one shard, which updates the error-feedback residual in place.

    Attributes
    ----------
    terms
        Number of clients in the sum.
    part
        Index of the message that was sent last.
    """

    def __init__(self, point_to_point: PointToPointCodec, residual: Tensor | None) -> None:
        self._point_to_point, self._residual = point_to_point, residual
        self.terms = self.part = 0
        self._unsent: Tensor | None = None
        self.set_terms(1)
        messages = _messages(self._codec, point_to_point.zeros(), RandomKey(0, 0, 0, 0), None)
        self._last = sum(1 for _ in messages) - 1

    def set_terms(self, terms: int) -> None:
        """Set the number of clients in the next sum, as far as it is known."""
        if terms != self.terms:
            self.terms, self._codec = terms, self._point_to_point.make_codec(terms)

    def begin(self, values: Tensor, key: RandomKey, terms: int) -> np.ndarray | None:
        """First part of a push of values, which are overwritten; None if one is not finite."""
        self.set_terms(terms)
        self._unsent = None if self._residual is None else self._residual.clone()
        self._run, self.part = _messages(self._codec, values, key, self._unsent, 1 / terms), 0
        self._message = next(self._run)
        return bytes_of(self._message.data).copy() if all_finite(self._message.data) else None

    @property
    def combined_bytes(self) -> int:
        """Size of the combination of this part; 0 for the last, whose combination is not sent back."""
        return 0 if self.part == self._last else _combined(self._message).nbytes

    def next_part(self, combination: np.ndarray) -> np.ndarray:
        """Next part, computed from the combination of this one."""
        bytes_of(_combined(self._message))[:] = combination
        self._message, self.part = next(self._run), self.part + 1
        return bytes_of(self._message.data).copy()

    def end(self, applied: bool) -> None:
        """End the push; the residual is updated if it was applied."""
        unsent, self._unsent = self._unsent, None
        if applied and self._residual is not None and unsent is not None:
            for _ in self._run:  # some schemes compute their residual only now
                pass
            self._residual.copy_(unsent)


class CodeSumServer:
    """Server side: the sum of one push of every client.

    Attributes
    ----------
    members
        Clients in the current sum; empty between two sums.
    part
        Index of the message that they must send next.
    terms
        Number of members when the sum was begun.
    """

    def __init__(self, point_to_point: PointToPointCodec) -> None:
        self._point_to_point = point_to_point
        self._part_sizes: dict[int, list[int]] = {}
        self.terms, self._codec = 1, point_to_point.make_codec(1)
        self.members: set[str] = set()
        self.part = 0

    def part_sizes(self, terms: int) -> list[int]:
        """Size in bytes of each part of a push, for a sum of `terms` clients."""
        if terms not in self._part_sizes:
            codec, zeros = self._point_to_point.make_codec(terms), self._point_to_point.zeros()
            messages = _messages(codec, zeros, RandomKey(0, 0, 0, 0), None)
            self._part_sizes[terms] = [message.data.nbytes for message in messages]
        return self._part_sizes[terms]

    def accepts_part(self, client: str, part: int) -> bool:
        """Whether a client may send this part now; part 0 is always accepted, for the next sum."""
        if part == 0:
            self.members.discard(client)
            return True
        return client in self.members and part == self.part

    def has_valid_size(self, nbytes: int, part: int, terms: int) -> bool:
        """Whether `nbytes` is the size of this part."""
        part_sizes = self.part_sizes(terms)
        return part < len(part_sizes) and nbytes == part_sizes[part]

    def begin(self, clients: Sequence[str], key: RandomKey) -> None:
        """Begin the sum of these clients' pushes."""
        self.members, self.part = set(clients), 0
        if len(clients) != self.terms:
            self.terms, self._codec = len(clients), self._point_to_point.make_codec(len(clients))
        self._values = self._point_to_point.zeros()
        residual = self._point_to_point.zero_residual()
        self._run = _messages(self._codec, self._values, key, residual, 1 / self.terms)
        self._message = next(self._run)

    def combine(self, parts: Sequence[np.ndarray]) -> np.ndarray | None:
        """Combination of the members' parts, in the order of the members; None if this was the last part."""
        message, missing = self._message, self.terms - len(parts)
        result = message.data
        others = [torch.from_numpy(part).view(result.dtype) for part in parts]
        if message.gathered is not None:
            message.gathered.copy_(torch.stack([*others, *[result] * missing]))
        elif message.op == "sum" and result.is_floating_point():
            for other in others:
                result += other
        elif message.op == "sum":
            words = _unsigned(result)
            words *= words.dtype.type(missing)
            for other in others:
                words += _unsigned(other)
        else:
            words = _unsigned(result)
            for other in others:
                _OPERATIONS[message.op](words, _unsigned(other), out=words)
        combination = bytes_of(_combined(message)).copy()
        next_message = next(self._run, None)
        if next_message is None:
            return None
        self._message, self.part = next_message, self.part + 1
        return combination

    def end(self, weight: float) -> Tensor:
        """The sum, after its last part, divided by the members' total weight."""
        self.members = set()
        return self._values.mul_(self.terms / weight)


def _messages(
    codec: Codec, values: Tensor, key: RandomKey, residual: Tensor | None, scale: float = 1.0
) -> Iterator[Message]:
    buffers = [torch.zeros(numel, dtype=dtype, device="cpu") for numel, dtype in codec.sum_buffers]
    run = codec.run(values, buffers, key, scale, residual)
    return (message for message in run if message is not None)


def _combined(message: Message) -> Tensor:
    return message.data if message.gathered is None else message.gathered


def _unsigned(words: Tensor) -> np.ndarray:
    """View words as unsigned integers, whose sums wrap around."""
    numbers: np.ndarray = words.numpy().view({2: np.uint16, 4: np.uint32, 8: np.uint64}[words.element_size()])
    return numbers
