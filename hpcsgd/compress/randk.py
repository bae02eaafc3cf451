"""GlobalRandK: random coordinates, equal on all ranks, in float32 or quantised."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import (
    Bits,
    Codec,
    Compressor,
    MaxMagnitude,
    Message,
    RandomKey,
    SampleRatio,
    SampleSize,
    Segment,
    all_finite,
    kernels_for,
    sample_size,
)
from hpcsgd.compress.float32 import Float32
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.compress.multiscale import QSGDMaxNormMultiScale
from hpcsgd.compress.packed_quantizer import BLOCK, BlockSize, Norm, ScaleOf
from hpcsgd.registry import checked


class GlobalRandK(Compressor):
    """Sends K coordinates, sampled in each step from a seed that all ranks share; no index is sent.

    Unbiased: sampled coordinates are multiplied by about d/K, the others are zero. With error feedback there
    is no factor. Vineeth S., arXiv 2109.12497. Our reading: one coordinate from each of K nearly equal
    intervals (so that memory is read in order), multiplied by the length of its interval.

    Parameters
    ----------
    k
        Number of coordinates of the whole model to send. Default: determined by `ratio`.
    ratio
        Fraction of the coordinates, above 0, at most 1. Default 0.1.
    """

    @checked
    def __init__(self, k: SampleSize | None = None, ratio: SampleRatio = 0.1) -> None:
        self.k, self.ratio = k, ratio
        self.inner: Compressor = Float32()

    def options(self) -> dict[str, object]:
        return {"k": self.k, "ratio": self.ratio, **self.inner.options()}

    def codec(self, segment: Segment) -> Codec:
        count = sample_size(self.k, self.ratio, segment) if segment.numel else 0
        return _RandKCodec(segment, count, self.inner)


class GlobalRandKMaxNorm(GlobalRandK):
    """GlobalRandK with coordinates quantised by MaxNorm.

    Parameters
    ----------
    bits, scale, block, norm
        See `QSGDMaxNorm`.
    k, ratio
        See `GlobalRandK`.
    """

    @checked
    def __init__(
        self,
        bits: Bits = 4,
        k: SampleSize | None = None,
        ratio: SampleRatio = 0.1,
        scale: ScaleOf = "block",
        block: BlockSize = BLOCK,
        norm: Norm = "max",
    ) -> None:
        super().__init__(k, ratio)
        self.inner = QSGDMaxNorm(bits, scale, block, norm)


class GlobalRandKMaxNormMultiScale(GlobalRandK):
    """GlobalRandK with coordinates quantised by MaxNorm with several scales.

    Parameters
    ----------
    bits, scale, block, norm
        See `QSGDMaxNormMultiScale`.
    k, ratio
        See `GlobalRandK`.
    """

    @checked
    def __init__(
        self,
        bits: tuple[Bits, ...] = (4, 8),
        k: SampleSize | None = None,
        ratio: SampleRatio = 0.1,
        scale: ScaleOf = "block",
        block: BlockSize = BLOCK,
        norm: Norm = "max",
    ) -> None:
        super().__init__(k, ratio)
        self.inner = QSGDMaxNormMultiScale(bits, scale, block, norm)


class _RandKCodec(Codec):
    def __init__(self, segment: Segment, count: int, inner: Compressor) -> None:
        self._max_magnitude = MaxMagnitude(segment)
        self._inner = inner.codec(Segment(count, segment.terms, segment.offset, device=segment.device))
        self._sample = torch.zeros(count, device=segment.device)
        self._residual = torch.zeros(count, device=segment.device)
        self.sum_buffers = self._inner.sum_buffers

    def run(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        kernels, key, sample, remainder = kernels_for(values), random_key.shared(), self._sample, None
        yield from self._max_magnitude.compute(values, residual)
        yield from kernels.take_sample(values, key, sample)
        if residual is not None:
            remainder = self._residual
            yield from kernels.take_sample(residual, key, remainder)
            sample += remainder
            remainder.zero_()
        if not all_finite(self._max_magnitude.norm):
            # So that the inner norms report it, even if the coordinate is not in the sample.
            sample.fill_(torch.inf)
        yield from self._inner.run(sample, buffers, random_key, scale, remainder)
        if residual is None or remainder is None:
            yield from kernels.put_sample(sample, key, True, True, values)
        else:
            residual += values
            yield from kernels.put_sample(remainder, key, False, False, residual)
            yield from kernels.put_sample(sample, key, False, True, values)
