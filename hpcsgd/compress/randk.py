"""GlobalRandK: random coordinates, equal on all ranks, in float32 or quantised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


class _Sampling(Compressor):
    """Samples coordinates, which another scheme sends."""

    k: SampleSize | None
    ratio: SampleRatio

    @property
    def inner(self) -> Compressor:
        """The scheme of the sampled coordinates."""
        raise NotImplementedError

    def codec(self, segment: Segment) -> Codec:
        count = sample_size(self.k, self.ratio, segment) if segment.numel else 0
        return _RandKCodec(segment, count, self.inner)


@dataclass(eq=False, repr=False)
class GlobalRandK(_Sampling):
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

    k: SampleSize | None = None
    ratio: SampleRatio = 0.1

    @property
    def inner(self) -> Compressor:
        return Float32()


@dataclass(eq=False, repr=False)
class GlobalRandKMaxNorm(_Sampling):
    """GlobalRandK with coordinates quantised by MaxNorm.

    Parameters
    ----------
    bits, scale, block, norm
        See `QSGDMaxNorm`.
    k, ratio
        See `GlobalRandK`.
    """

    bits: Bits = 4
    k: SampleSize | None = None
    ratio: SampleRatio = 0.1
    scale: ScaleOf = "block"
    block: BlockSize = BLOCK
    norm: Norm = "max"

    @property
    def inner(self) -> Compressor:
        return QSGDMaxNorm(self.bits, self.scale, self.block, self.norm)


@dataclass(eq=False, repr=False)
class GlobalRandKMaxNormMultiScale(_Sampling):
    """GlobalRandK with coordinates quantised by MaxNorm with several scales.

    Parameters
    ----------
    bits, scale, block, norm
        See `QSGDMaxNormMultiScale`.
    k, ratio
        See `GlobalRandK`.
    """

    bits: tuple[Bits, ...] = (4, 8)
    k: SampleSize | None = None
    ratio: SampleRatio = 0.1
    scale: ScaleOf = "block"
    block: BlockSize = BLOCK
    norm: Norm = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.inner  # which checks the order of the bits

    @property
    def inner(self) -> Compressor:
        return QSGDMaxNormMultiScale(self.bits, self.scale, self.block, self.norm)


class _RandKCodec(Codec):
    def __init__(self, segment: Segment, count: int, inner: Compressor) -> None:
        self._magnitude_of_all = MaxMagnitude(segment)
        self._inner = inner.codec(Segment(count, segment.terms, segment.offset, device=segment.device))
        self._sample = torch.zeros(count, device=segment.device)
        self._residual = torch.zeros(count, device=segment.device)
        self.sum_buffers, self.norms = self._inner.sum_buffers, self._inner.norms

    def compute_norms(self, values: Tensor, random_key: RandomKey, residual: Tensor | None) -> Iterator[None]:
        kernels, key, sample, remainder = kernels_for(values), random_key.shared(), self._sample, None
        yield from self._magnitude_of_all.compute(values, residual)
        yield from kernels.take_sample(values, key, sample)
        if residual is not None:
            remainder = self._residual
            yield from kernels.take_sample(residual, key, remainder)
            sample += remainder
            remainder.zero_()
        if not all_finite(self._magnitude_of_all.norm):
            # So that the inner norms report it, even if the coordinate is not in the sample.
            sample.fill_(torch.inf)
        yield from self._inner.compute_norms(sample, random_key, remainder)

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        kernels, key, sample = kernels_for(values), random_key.shared(), self._sample
        remainder = None if residual is None else self._residual
        yield from self._inner.reduce(sample, buffers, random_key, scale, remainder)
        if residual is None or remainder is None:
            yield from kernels.put_sample(sample, key, True, True, values)
        else:
            residual += values
            yield from kernels.put_sample(remainder, key, False, False, residual)
            yield from kernels.put_sample(sample, key, False, True, values)
