"""Top-k: the largest elements of each rank, by all-gather: a baseline, because all-reduce cannot sum them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcsgd.compress.base import (
    Codec,
    Compressor,
    Message,
    RandomKey,
    SampleRatio,
    SampleSize,
    Segment,
    sample_size,
)


@dataclass(eq=False, repr=False)
class TopK(Compressor):
    """Sends the k largest elements of each rank with their indices; biased, so use it with `ErrorFeedback`.

    An element takes 8 bytes, and every rank receives those of all others: bytes and work grow with the number
    of ranks.

    Parameters
    ----------
    k
        Number of elements of the whole model that a rank sends. Default: determined by `ratio`.
    ratio
        Fraction of the elements, above 0, at most 1. Default 0.01.
    """

    k: SampleSize | None = None
    ratio: SampleRatio = 0.01

    def codec(self, segment: Segment) -> Codec:
        return _TopKCodec(segment, sample_size(self.k, self.ratio, segment) if segment.numel else 0)


class _TopKCodec(Codec):
    def __init__(self, segment: Segment, count: int) -> None:
        super().__init__(segment)
        self._count = count
        # Values in the first half of a row and indices in the second, so that one message carries both.
        self._packed = torch.zeros(2 * count, dtype=torch.int32, device=segment.device)
        self._gathered = torch.zeros((segment.terms, 2 * count), dtype=torch.int32, device=segment.device)

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        total = values.float() if residual is None else values.float() + residual
        _, indices = torch.topk(total.abs(), self._count, sorted=False)
        self._packed[: self._count] = total[indices].view(torch.int32)
        self._packed[self._count :] = indices
        yield Message("gather", self._packed, gathered=self._gathered)
        if residual is not None:
            residual.copy_(total)
            residual[indices] = 0
        total.zero_()
        for row in self._gathered:
            elements, indices = row[: self._count].view(torch.float32), row[self._count :].long()
            total.index_add_(0, indices, elements * scale)
            yield None
        values.copy_(total)
