"""Codec of the MaxNorm schemes: codes with shared scales, packed in lanes that an all-reduce can sum.

Vineeth S., arXiv 2109.12497: all ranks share the norm W (a MAX all-reduce), round their elements
stochastically to multiples of W / levels, and sum the codes. Our additions: bit packing (see
`hpcsgd.kernels.codec.spec`), and one norm a bucket, tensor or block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Message, RandomKey, Segment, all_finite, kernels_for
from hpcsgd.errors import BadOption
from hpcsgd.registry import Within

if TYPE_CHECKING:
    from hpcsgd.kernels.codec.spec import Tiling

ScaleOf = Literal["block", "tensor", "bucket"]
Norm = Literal["max", "euclidean"]

BLOCK = 384
#: Elements of a block.
BlockSize = Annotated[int, Within(16, 2**20)]
_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Scaling:
    """Choice of the norm, and of the elements that share it.

    Attributes
    ----------
    scale
        One norm for each "block" of consecutive elements, "tensor", or "bucket".
    block
        Maximum number of elements of a block.
    norm
        "max", the largest magnitude, or "euclidean".
    """

    scale: ScaleOf = "block"
    block: int = BLOCK
    norm: Norm = "max"


class PackedQuantizer(Codec):
    """Quantises a segment with one scale, or with several, of which each element uses the finest that fits.

    Parameters
    ----------
    segment
        The elements.
    levels
        Levels of each scale, ascending; codes are in [-levels[0], levels[0]] at every scale.
    scaling
        Choice of norms.

    Raises
    ------
    BadOption
        The sum of the codes of all terms needs more than 32 bits.
    """

    def __init__(self, segment: Segment, levels: tuple[int, ...], scaling: Scaling) -> None:
        from hpcsgd.kernels.codec import spec

        try:
            self._lanes = spec.lanes_for(levels[0], segment.terms)
        except ValueError as error:
            raise BadOption(
                f"codes cannot be summed over {segment.terms} terms: {error}",
                do="use fewer bits (option bits), or algorithm 'two-level' (--algorithm "
                "two-level), which adds float32 inside each node first",
                everywhere=True,
            ) from None
        self._offset, self._terms, self._scaling = segment.offset, segment.terms, scaling
        self._levels = torch.tensor(levels, dtype=torch.float32, device=segment.device)
        extents = _extents(segment, scaling.scale)
        tilings = [spec.Tiling.of(stop - start, self._lanes.count, scaling.block) for start, stop in extents]
        finer = len(levels) - 1
        mask_words = [finer * -(-tiling.rows // 32) * tiling.row for tiling in tilings]

        def zeros(numel: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device=segment.device)

        self._row_norms = zeros(sum(tiling.rows for tiling in tilings), torch.uint16)
        self._masks = zeros(sum(mask_words), torch.int32)
        shared = {"block": len(self._row_norms), "tensor": len(extents), "bucket": 1}[scaling.scale]
        self.norms = zeros(shared, torch.uint16)
        self._parts = [
            _Part(slice(*extent), tiling, norms, masks.view(finer, len(masks) // max(1, finer)))
            for extent, tiling, norms, masks in zip(
                extents,
                tilings,
                torch.split(self._row_norms, [tiling.rows for tiling in tilings]),
                torch.split(self._masks, mask_words),
                strict=True,
            )
        ]
        self._words = [tiling.words for tiling in tilings]
        self.sum_buffers = [(sum(self._words), torch.int32 if self._lanes.word == 32 else torch.int64)]

    @property
    def bits_per_element(self) -> float:
        """Bits of the words an element; norms and masks are not counted."""
        return self._lanes.bits_per_element

    def compute_norms(self, values: Tensor, random_key: RandomKey, residual: Tensor | None) -> Iterator[None]:
        kernels, euclidean = kernels_for(values), self._scaling.norm == "euclidean"
        for part, remainder in zip(self._parts, self._of_parts(residual), strict=True):
            yield from kernels.norms(values[part.elements], remainder, part.tiling, euclidean, part.norms)
        self._combine_row_norms()

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        kernels, key = kernels_for(values), random_key.per_rank()
        words, residuals = torch.split(buffers[0], self._words), self._of_parts(residual)
        self._expand_norms()
        if len(self._levels) > 1:
            for part, remainder in zip(self._parts, residuals, strict=True):
                x = values[part.elements]
                yield from kernels.choose_scales(
                    x, remainder, part.norms, part.tiling, self._levels, part.masks
                )
            yield Message("and", self._masks)

        for part, remainder, word in zip(self._parts, residuals, words, strict=True):
            x, offset = values[part.elements], self._offset + part.elements.start
            yield from kernels.encode(x, remainder, *self._code_arguments(part), key, offset, word)
        yield Message("sum", buffers[0])
        for part, word in zip(self._parts, words, strict=True):
            x = values[part.elements]
            yield from kernels.decode(word, *self._code_arguments(part), self._terms, scale, x)

    def _of_parts(self, residual: Tensor | None) -> list[Tensor | None]:
        return [None if residual is None else residual[part.elements] for part in self._parts]

    def _code_arguments(self, part: _Part) -> tuple[object, ...]:
        return part.norms, part.tiling, self._lanes, self._levels, part.masks

    def _combine_row_norms(self) -> None:
        """Compute the norms that this rank sends from the norms of its rows."""
        if self._scaling.scale == "block":
            self.norms.copy_(self._row_norms)
        elif self._scaling.scale == "bucket":
            self.norms[0] = _combined_norm(self._row_norms, self._scaling.norm)
        else:
            for index, part in enumerate(self._parts):
                self.norms[index] = _combined_norm(part.norms, self._scaling.norm)

    def _expand_norms(self) -> None:
        """Set the norms of rows to those of all ranks."""
        if self._scaling.scale == "block":
            self._row_norms.copy_(self.norms)
        elif self._scaling.scale == "bucket":
            self._row_norms.copy_(self.norms.expand_as(self._row_norms))
        else:
            for index, part in enumerate(self._parts):
                part.norms.copy_(self.norms[index].expand_as(part.norms))


@dataclass(frozen=True)
class _Part:
    """Consecutive elements with a tiling of their own, and views of their norms and masks."""

    elements: slice
    tiling: Tiling
    norms: Tensor
    masks: Tensor


def _extents(segment: Segment, scale: ScaleOf) -> list[tuple[int, int]]:
    """Return (start, stop) of the whole segment, or of each tensor with the gap that follows it."""
    if scale != "tensor" or not segment.tensors:
        return [(0, segment.numel)]
    starts = [0, *(start for start, _ in segment.tensors[1:]), segment.numel]
    return list(pairwise(starts))


def _combined_norm(rows: Tensor, norm: Norm) -> int:
    """Return the norm (as uint16) of all rows, given their norms (uint16); never below any of them."""
    from hpcsgd.kernels.codec.spec import LARGEST_NORM

    largest = int(rows.view(torch.int16).max()) if rows.numel() else 0
    if norm == "max" or not all_finite(rows):
        return largest
    squares = (rows.view(torch.int16).int() << 16).view(torch.float32).double().square().sum()
    length = squares.sqrt().clamp(max=_LARGEST).float().view(torch.int32)
    return min(LARGEST_NORM, max(largest, int(length + 0xFFFF) >> 16))
