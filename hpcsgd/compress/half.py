"""FP16 and BF16: a cast to half precision, which halves the bytes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment, chunks


class FP16(Compressor):
    """Half precision, scaled by a power of two so that the sum does not overflow.

    The power of two follows from the largest magnitude over all ranks, so the sum over the ranks fits too,
    and uniformly small gradients do not underflow.
    """

    dtype = torch.float16

    def codec(self, segment: Segment) -> Codec:
        return _HalfCodec(segment, self.dtype)


class BF16(FP16):
    """Bfloat16: the range of float32 with 8 bits of precision."""

    dtype = torch.bfloat16


class _HalfCodec(Codec):
    def __init__(self, segment: Segment, dtype: torch.dtype) -> None:
        super().__init__(segment)
        self._terms = segment.terms
        self.sum_buffers = [(segment.numel, dtype)]

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        half = buffers[0]
        # The sum of all terms stays below 2**15; float16 ends at 2**16.
        factor = 2.0 ** min(15 - self.magnitude.exponent() - self._terms.bit_length(), 126)
        # Numbers close to the largest float32 would be rounded up to infinity.
        limit = (2.0 - torch.finfo(half.dtype).eps) * 2.0**127
        for chunk in chunks(len(values)):
            x = values[chunk].float()
            if residual is not None:
                x = x + residual[chunk]
            half[chunk] = x.clamp(-limit, limit) * factor
            if residual is not None:
                residual[chunk] = x - half[chunk].float() / factor
            yield None
        yield Message("sum", half)
        for chunk in chunks(len(values)):
            values[chunk] = half[chunk].float() * (scale / factor)
            yield None
