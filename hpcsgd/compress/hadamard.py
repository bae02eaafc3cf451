"""A random rotation before any scheme: it spreads large elements over their neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Draw, Message, Stretch, ops
from hpcsgd.errors import BadOption


class Hadamard(Compressor):
    """Rotates in blocks before `inner` compresses, and back after the sum.

    x becomes H D x: random signs, then a Walsh-Hadamard transform. It is linear, so the sum of rotated
    gradients is the rotated sum; and it is fixed for the whole run, so that error feedback keeps its memory
    in the rotated basis. After Suresh et al., arXiv 1611.00429.

    Parameters
    ----------
    inner
        Any scheme that is not `whole`.
    """

    def __init__(self, inner: Compressor) -> None:
        if inner.whole:
            raise BadOption(f"{inner} cannot be rotated", do="use it alone: it needs matrices")
        self.inner = inner
        self.feedback = inner.feedback

    def options(self) -> dict[str, object]:
        return {"inner": str(self.inner)}

    def codec(self, stretch: Stretch) -> Codec:
        plain = Stretch(stretch.numel, stretch.terms, stretch.first, stretch.share, (), stretch.device)
        return _RotatedCodec(stretch, self.inner.codec(plain))


class _RotatedCodec(Codec):
    def __init__(self, stretch: Stretch, inner: Codec) -> None:
        self._inner, self._first = inner, stretch.first
        self._rotated = torch.zeros(stretch.numel, device=stretch.device)
        self.sums = inner.sums

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        kernels, key = ops(values), draw.lasting()
        yield from kernels.rotate(values, key, self._first, self._rotated)
        yield from self._inner.run(self._rotated, buffers, draw, scale, residual)
        yield from kernels.unrotate(self._rotated, key, self._first, values)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
