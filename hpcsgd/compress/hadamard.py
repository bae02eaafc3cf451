"""Random rotation before a scheme, which spreads large elements over their neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment, Wrapper, kernels_for
from hpcsgd.errors import BadOption


class Hadamard(Wrapper):
    """Rotates blocks before `inner` compresses them, and back after the sum.

    x becomes H D x: random signs, then a Walsh-Hadamard transform. The rotation is linear, so the sum of
    rotated gradients is the rotated sum. It is fixed for the whole run, so the error-feedback residual is
    held in the rotated basis. After Suresh et al., arXiv 1611.00429.

    Parameters
    ----------
    inner
        A scheme that does not need whole tensors.

    Raises
    ------
    BadOption
        `inner` needs whole tensors.
    """

    def __init__(self, inner: Compressor) -> None:
        if inner.needs_whole_tensors:
            raise BadOption(f"{inner} cannot be rotated: it needs whole matrices", do="leave out 'hadamard+'")
        super().__init__(inner)
        self.feedback = inner.feedback

    def codec(self, segment: Segment) -> Codec:
        plain = Segment(segment.numel, segment.terms, segment.offset, segment.share, (), segment.device)
        return _RotatedCodec(segment, self.inner.codec(plain))


class _RotatedCodec(Codec):
    def __init__(self, segment: Segment, inner: Codec) -> None:
        self._inner, self._offset, self.norms = inner, segment.offset, inner.norms
        self._rotated = torch.zeros(segment.numel, device=segment.device)
        self.sum_buffers = inner.sum_buffers

    def compute_norms(self, values: Tensor, random_key: RandomKey, residual: Tensor | None) -> Iterator[None]:
        yield from kernels_for(values).rotate(values, random_key.fixed(), self._offset, self._rotated)
        yield from self._inner.compute_norms(self._rotated, random_key, residual)

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        yield from self._inner.reduce(self._rotated, buffers, random_key, scale, residual)
        yield from kernels_for(values).unrotate(self._rotated, random_key.fixed(), self._offset, values)

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
