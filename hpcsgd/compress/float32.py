"""Float32 without compression, as a codec: a baseline for quantisers, and the values of `GlobalRandK`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment


class Float32(Compressor):
    """No compression."""

    def codec(self, segment: Segment) -> Codec:
        return _Float32Codec(segment)


class _Float32Codec(Codec):
    def __init__(self, segment: Segment) -> None:
        super().__init__(segment)
        self.sum_buffers = [(segment.numel, torch.float32)]

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        buffers[0].copy_(values)
        if residual is not None:
            buffers[0].add_(residual)
            residual.zero_()
        buffers[0].mul_(scale)
        yield Message("sum", buffers[0])
        values.copy_(buffers[0])
