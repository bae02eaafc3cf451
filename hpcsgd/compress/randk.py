"""GlobalRandK: coordinates that all ranks draw alike, alone or quantised."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import (
    Codec,
    Compressor,
    Draw,
    Largest,
    Message,
    Stretch,
    check_count,
    count_of,
    finite,
    ops,
)
from hpcsgd.compress.float32 import Float32
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.compress.multiscale import QSGDMaxNormMultiScale
from hpcsgd.compress.packed_quantizer import BLOCK, Norm, ScaleOf


class GlobalRandK(Compressor):
    """K coordinates, drawn anew in each step from a seed that all ranks share; no index is sent.

    Unbiased: what is drawn is multiplied by about d/K, the others are zero. With error feedback there is
    no factor. Vineeth S., arXiv 2109.12497. Our reading: one coordinate of each of K nearly equal stretches
    (so that memory is read in order), multiplied by the length of its stretch.

    Parameters
    ----------
    k
        Coordinates of the whole model that are sent; default: `ratio` of them.
    ratio
        Share of the coordinates, above 0, at most 1. Default 0.1.
    """

    def __init__(self, k: int | None = None, ratio: float = 0.1) -> None:
        check_count(k, ratio)
        self.k, self.ratio = k, ratio
        self.inner: Compressor = Float32()

    def options(self) -> dict[str, object]:
        return {"k": self.k, "ratio": self.ratio, **self.inner.options()}

    def codec(self, stretch: Stretch) -> Codec:
        count = count_of(self.k, self.ratio, stretch) if stretch.numel else 0
        return _RandKCodec(stretch, count, self.inner)


class GlobalRandKMaxNorm(GlobalRandK):
    """RandK whose coordinates are quantised by MaxNorm.

    Parameters
    ----------
    bits, scale, block, norm
        See `QSGDMaxNorm`.
    k, ratio
        See `GlobalRandK`.
    """

    def __init__(
        self,
        bits: int = 4,
        k: int | None = None,
        ratio: float = 0.1,
        scale: ScaleOf = "block",
        block: int = BLOCK,
        norm: Norm = "max",
    ) -> None:
        super().__init__(k, ratio)
        self.inner = QSGDMaxNorm(bits, scale, block, norm)


class GlobalRandKMaxNormMultiScale(GlobalRandK):
    """RandK whose coordinates are quantised by MaxNorm with several scales.

    Parameters
    ----------
    bits, scale, block, norm
        See `QSGDMaxNormMultiScale`.
    k, ratio
        See `GlobalRandK`.
    """

    def __init__(
        self,
        bits: tuple[int, ...] = (4, 8),
        k: int | None = None,
        ratio: float = 0.1,
        scale: ScaleOf = "block",
        block: int = BLOCK,
        norm: Norm = "max",
    ) -> None:
        super().__init__(k, ratio)
        self.inner = QSGDMaxNormMultiScale(bits, scale, block, norm)


class _RandKCodec(Codec):
    def __init__(self, stretch: Stretch, count: int, inner: Compressor) -> None:
        self._largest = Largest(stretch)
        self._inner = inner.codec(Stretch(count, stretch.terms, stretch.first, device=stretch.device))
        self._picked = torch.zeros(count, device=stretch.device)
        self._rest = torch.zeros(count, device=stretch.device)
        self.sums = self._inner.sums

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        kernels, key, rest = ops(values), draw.common(), None
        yield from self._largest.find(values, residual)
        yield from kernels.pick(values, key, self._picked)
        if residual is not None:
            rest = self._rest
            yield from kernels.pick(residual, key, rest)
            self._picked += rest
            rest.zero_()
        if not finite(self._largest.norm):
            # Also where it lies in a coordinate that was not drawn: the inner norms then say so.
            self._picked.fill_(torch.inf)
        yield from self._inner.run(self._picked, buffers, draw, scale, rest)
        if residual is None or rest is None:
            yield from kernels.place(self._picked, key, True, True, values)
        else:
            residual += values
            yield from kernels.place(rest, key, False, False, residual)
            yield from kernels.place(self._picked, key, False, True, values)
