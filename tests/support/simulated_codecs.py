"""Compression on simulated ranks: one codec each, whose messages are combined by NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment, all_finite

_OPERATIONS = {"max": np.maximum, "and": np.bitwise_and, "sum": np.add}


class NotFinite(Exception):
    """The first message of a rank shows that its values are not finite."""


class Lockstep:
    """Drives the codecs of all ranks from message to message.

    Parameters
    ----------
    compressor
        The scheme.
    segment
        The segment of each rank; its `terms` are the ranks.
    feedback
        Whether ranks have residuals.
    seed, bucket
        Of the random numbers.

    Attributes
    ----------
    residuals
        (numel,) of each rank, or None.
    messages
        (operation, bytes) of the messages of rank 0 in the last reduction.
    """

    def __init__(
        self, compressor: Compressor, segment: Segment, feedback: bool, seed: int = 0, bucket: int = 0
    ) -> None:
        ranks = range(segment.terms)
        self.segment, self.seed, self.bucket = segment, seed, bucket
        self.codecs = [compressor.codec(segment) for _ in ranks]
        self.residuals = [
            torch.zeros(segment.numel, device=segment.device) if feedback else None for _ in ranks
        ]
        self.messages: list[tuple[str, int]] = []

    def random_key(self, rank: int, step: int) -> RandomKey:
        return RandomKey(self.seed, step, self.bucket, rank)

    def reduce(self, rows: Tensor, step: int = 0, scale: float = 1.0) -> Tensor:
        """Reduce the values of all ranks, (ranks, numel), which are not changed; returns their results."""
        out = rows.clone()
        self.messages = []
        runs = [
            codec.run(values, buffers_of(codec, values.device), self.random_key(rank, step), scale, residual)
            for rank, (codec, values, residual) in enumerate(
                zip(self.codecs, out, self.residuals, strict=True)
            )
        ]
        while any(messages := [_next(run) for run in runs]):
            assert all(messages), "all ranks send, or none does"
            every = [message for message in messages if message is not None]
            assert len({(m.op, m.buffer_index, m.data.dtype, m.data.numel()) for m in every}) == 1
            if not self.messages:
                assert every[0].op == "max"
                if not all(all_finite(message.data) for message in every):
                    raise NotFinite
            self.messages.append((every[0].op, every[0].data.nbytes))
            combine(every)
        return out


def buffers_of(codec: Codec, device: torch.device) -> list[Tensor]:
    """Create buffers with arbitrary previous contents."""
    return [torch.full((numel,), 77, dtype=dtype, device=device) for numel, dtype in codec.sum_buffers]


def _next(run: Iterator[Message | None]) -> Message | None:
    """The run's next message; None at its end."""
    return next((message for message in run if message is not None), None)


def combine(messages: Sequence[Message]) -> None:
    """Combine the messages of all ranks as MPI would."""
    op, parts = messages[0].op, [message.data for message in messages]
    if op == "gather":
        for message in messages:
            assert message.gathered is not None
            message.gathered.copy_(torch.stack(parts))
        return
    if op == "sum" and parts[0].is_floating_point():
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
    else:
        words = np.stack([unsigned(part) for part in parts])
        combined = _OPERATIONS[op].reduce(words, axis=0, dtype=words.dtype)
        total = torch.from_numpy(combined).view(parts[0].dtype)
    for part in parts:
        part.copy_(total)


def unsigned(words: Tensor) -> np.ndarray:
    """View words as unsigned integers, which wrap around."""
    return words.numpy(force=True).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[words.element_size()])
