"""Codes with shared scales, packed in lanes that an all-reduce can add: the MaxNorm schemes' codec.

Vineeth S., arXiv 2109.12497: all ranks share the norm W (a MAX all-reduce), code = W's share rounded at
random, codes are summed. Ours: real bits (see `hpcsgd.kernels.codec.spec`), one norm a bucket, tensor or
block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Draw, Message, Stretch, finite, ops
from hpcsgd.errors import BadOption

if TYPE_CHECKING:
    from hpcsgd.kernels.codec.spec import Layout

ScaleOf = Literal["block", "tensor", "bucket"]
Norm = Literal["max", "euclidean"]

BLOCK = 384
_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Scaling:
    """Which elements share a norm, and which norm.

    Attributes
    ----------
    scale
        One norm per "block" of consecutive elements, per "tensor", or per "bucket".
    block
        Elements of a block, at most; in elements.
    norm
        "max", the largest magnitude, or "euclidean".
    """

    scale: ScaleOf = "block"
    block: int = BLOCK
    norm: Norm = "max"

    def check(self) -> None:
        """Raise `BadOption` for options that do not exist."""
        for name, value, valid in (
            ("scale", self.scale, ("block", "tensor", "bucket")),
            ("norm", self.norm, ("max", "euclidean")),
        ):
            if value not in valid:
                raise BadOption(f"{name} of a quantiser", expected=" or ".join(valid), got=repr(value))
        if not 16 <= self.block <= 2**20:
            raise BadOption("block of a quantiser", expected="16 to 1048576 elements", got=self.block)


class LaneCodec(Codec):
    """Quantises a stretch with one scale, or with several of which each element uses the finest that fits.

    Parameters
    ----------
    stretch
        What to work on.
    levels
        Levels of each scale, ascending; codes are in [-levels[0], levels[0]] at every scale.
    scaling
        Which elements share a norm.

    Raises
    ------
    BadOption
        Where the sum of the codes of all terms needs more bits than a float32.
    """

    def __init__(self, stretch: Stretch, levels: tuple[int, ...], scaling: Scaling) -> None:
        from hpcsgd.kernels.codec import spec

        try:
            self._lanes = spec.lanes(levels[0], stretch.terms)
        except ValueError as error:
            raise BadOption(
                f"codes cannot be summed over {stretch.terms} terms: {error}",
                do="use fewer bits, or algorithm 'two-level', which adds float32 inside each node first",
                everywhere=True,
            ) from None
        self._first, self._terms, self._scaling = stretch.first, stretch.terms, scaling
        self._levels = torch.tensor(levels, dtype=torch.float32, device=stretch.device)
        extents = _extents(stretch, scaling.scale)
        layouts = [spec.Layout.of(stop - start, self._lanes.count, scaling.block) for start, stop in extents]
        finer = len(levels) - 1
        mask_words = [finer * -(-layout.rows // 32) * layout.row for layout in layouts]

        def zeros(numel: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(numel, dtype=dtype, device=stretch.device)

        self._norms = zeros(sum(layout.rows for layout in layouts), torch.uint16)
        self._masks = zeros(sum(mask_words), torch.int32)
        shared = {"block": len(self._norms), "tensor": len(extents), "bucket": 1}[scaling.scale]
        self._shared = zeros(shared, torch.uint16)
        self._parts = [
            _Part(slice(*extent), layout, norms, masks.view(finer, len(masks) // max(1, finer)))
            for extent, layout, norms, masks in zip(
                extents,
                layouts,
                torch.split(self._norms, [layout.rows for layout in layouts]),
                torch.split(self._masks, mask_words),
                strict=True,
            )
        ]
        self._words = [layout.words for layout in layouts]
        self.sums = [(sum(self._words), torch.int32 if self._lanes.word == 32 else torch.int64)]

    @property
    def bits_per_element(self) -> float:
        """Of the words; norms and masks come on top."""
        return self._lanes.bits_per_element

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        kernels, key = ops(values), draw.own()
        words = torch.split(buffers[0], self._words)
        rests = [None if residual is None else residual[part.elements] for part in self._parts]
        euclidean = self._scaling.norm == "euclidean"
        for part, rest in zip(self._parts, rests, strict=True):
            yield from kernels.norms(values[part.elements], rest, part.layout, euclidean, part.norms)
        self._share_norms()
        yield Message("max", self._shared)
        self._spread_norms()

        if len(self._levels) > 1:
            for part, rest in zip(self._parts, rests, strict=True):
                x = values[part.elements]
                yield from kernels.choose_scales(x, rest, part.norms, part.layout, self._levels, part.masks)
            yield Message("and", self._masks)

        for part, rest, word in zip(self._parts, rests, words, strict=True):
            x, offset = values[part.elements], self._first + part.elements.start
            yield from kernels.encode(x, rest, *self._coding(part), key, offset, word)
        yield Message("sum", buffers[0])
        for part, word in zip(self._parts, words, strict=True):
            x = values[part.elements]
            yield from kernels.decode(word, *self._coding(part), self._terms, scale, x)

    def _coding(self, part: _Part) -> tuple[object, ...]:
        return part.norms, part.layout, self._lanes, self._levels, part.masks

    def _share_norms(self) -> None:
        """The norms of rows as those of what shares a scale."""
        if self._scaling.scale == "block":
            self._shared.copy_(self._norms)
        elif self._scaling.scale == "bucket":
            self._shared[0] = _whole_norm(self._norms, self._scaling.norm)
        else:
            for index, part in enumerate(self._parts):
                self._shared[index] = _whole_norm(part.norms, self._scaling.norm)

    def _spread_norms(self) -> None:
        """The other way round, with the norms of all ranks."""
        if self._scaling.scale == "block":
            self._norms.copy_(self._shared)
        elif self._scaling.scale == "bucket":
            self._norms.copy_(self._shared.expand_as(self._norms))
        else:
            for index, part in enumerate(self._parts):
                part.norms.copy_(self._shared[index].expand_as(part.norms))


@dataclass(frozen=True)
class _Part:
    """Consecutive elements with rows of their own, and views of their norms and masks."""

    elements: slice
    layout: Layout
    norms: Tensor
    masks: Tensor


def _extents(stretch: Stretch, scale: ScaleOf) -> list[tuple[int, int]]:
    """The stretch in one, or each of its tensors with the gap that follows it."""
    if scale != "tensor" or not stretch.tensors:
        return [(0, stretch.numel)]
    starts = [0, *(start for start, _ in stretch.tensors[1:]), stretch.numel]
    return list(pairwise(starts))


def _whole_norm(rows: Tensor, norm: Norm) -> int:
    """The norm (as uint16) of what these rows (norms, uint16) make up; never below theirs."""
    from hpcsgd.kernels.codec.spec import LARGEST_NORM

    largest = int(rows.view(torch.int16).max()) if rows.numel() else 0
    if norm == "max" or not finite(rows):
        return largest
    squares = (rows.view(torch.int16).int() << 16).view(torch.float32).double().square().sum()
    length = squares.sqrt().clamp(max=_LARGEST).float().view(torch.int32)
    return min(LARGEST_NORM, max(largest, int(length + 0xFFFF) >> 16))
