"""Plain float32, as a codec: what the quantisers are compared with, and the coordinates of `GlobalRandK`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Draw, Largest, Message, Stretch


class Float32(Compressor):
    """No compression."""

    def codec(self, stretch: Stretch) -> Codec:
        return _Float32Codec(stretch)


class _Float32Codec(Codec):
    def __init__(self, stretch: Stretch) -> None:
        self._largest = Largest(stretch)
        self.sums = [(stretch.numel, torch.float32)]

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        yield from self._largest.find(values, residual)
        yield Message("max", self._largest.norm)
        buffers[0].copy_(values)
        if residual is not None:
            buffers[0].add_(residual)
            residual.zero_()
        buffers[0].mul_(scale)
        yield Message("sum", buffers[0])
        values.copy_(buffers[0])
