"""FP16 and BF16: half the bytes, by a cast."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Draw, Largest, Message, Stretch, pieces


class FP16(Compressor):
    """Half precision, scaled by a power of two, so that it does not overflow.

    The power is that of the largest magnitude over all ranks, so that the sum fits too, and gradients that
    are small as a whole do not vanish.
    """

    dtype = torch.float16

    def codec(self, stretch: Stretch) -> Codec:
        return _HalfCodec(stretch, self.dtype)


class BF16(FP16):
    """bfloat16: the range of float32 with 8 bits of precision."""

    dtype = torch.bfloat16


class _HalfCodec(Codec):
    def __init__(self, stretch: Stretch, dtype: torch.dtype) -> None:
        self._largest = Largest(stretch)
        self._terms = stretch.terms
        self.sums = [(stretch.numel, dtype)]

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        half = buffers[0]
        yield from self._largest.find(values, residual)
        yield Message("max", self._largest.norm)
        # The sum of all terms stays below 2**15; float16 ends at 2**16.
        factor = 2.0 ** min(15 - self._largest.exponent() - self._terms.bit_length(), 126)
        # Numbers next to the largest float32 would be rounded up to infinity.
        limit = (2.0 - torch.finfo(half.dtype).eps) * 2.0**127
        for piece in pieces(len(values)):
            x = values[piece].float()
            if residual is not None:
                x = x + residual[piece]
            half[piece] = x.clamp(-limit, limit) * factor
            if residual is not None:
                residual[piece] = x - half[piece].float() / factor
            yield None
        yield Message("sum", half)
        for piece in pieces(len(values)):
            values[piece] = half[piece].float() * (scale / factor)
            yield None
