"""PowerSGD: gradients of matrices as products of two low-rank factors, which all-reduce can sum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment
from hpcsgd.registry.limits import Size


@dataclass(eq=False, repr=False)
class PowerSGD(Compressor):
    """Rank-r factors by one step of subspace iteration, warm-started from the previous step.

    P = sum of M_i Q, orthogonalised; Q = sum of M_i^T P; the result is P Q^T. Biased, so use it with
    `ErrorFeedback`. One-dimensional and small tensors are sent uncompressed, with P. Vogels et al., arXiv
    1905.13727; our reading: the residual is M_i minus the product of P and this rank's own M_i^T P.

    Parameters
    ----------
    rank
        Columns of the factors, at least 1. Default 2.
    """

    needs_whole_tensors = True

    rank: Size = 2

    def codec(self, segment: Segment) -> Codec:
        return _PowerCodec(segment, self.rank)


@dataclass
class _Matrix:
    """Position of a matrix in the segment, and of its factors in the flat P and Q."""

    start: int
    rows: int
    columns: int
    left: slice
    right: slice


class _PowerCodec(Codec):
    def __init__(self, segment: Segment, rank: int) -> None:
        self._rank, self._terms = rank, segment.terms
        super().__init__(segment)
        self._matrices: list[_Matrix] = []
        self._raw: list[slice] = []
        left = right = end = 0
        for start, shape in segment.tensors:
            rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
            if rank * (rows + columns) >= rows * columns:
                continue
            self._raw.append(slice(end, start))
            end = start + rows * columns
            p, q = rows * rank, columns * rank
            self._matrices.append(
                _Matrix(start, rows, columns, slice(left, left + p), slice(right, right + q))
            )
            left, right = left + p, right + q
        self._raw.append(slice(end, segment.numel))
        raw = sum(part.stop - part.start for part in self._raw)
        self._right = torch.zeros(right, device=segment.device)
        self._started = False
        self._left_size = left
        self.sum_buffers = [(left + raw, torch.float32), (right, torch.float32)]

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        left, raw, right = buffers[0][: self._left_size], buffers[0][self._left_size :], buffers[1]
        if not self._started:
            self._start(random_key)
        # Scaled to about 1 over all ranks, so that products neither overflow nor underflow.
        factor = 2.0 ** -min(self.magnitude.exponent() + self._terms.bit_length(), 126)
        total = (values.float() if residual is None else values.float() + residual) * factor
        for m in self._matrices:
            torch.mm(_matrix(total, m), self._factor(self._right, m.right), out=self._factor(left, m.left))
            yield None
        if len(raw):
            torch.cat([total[part] for part in self._raw], out=raw)
        yield Message("sum", buffers[0], 0)
        for m in self._matrices:
            p = self._factor(left, m.left)
            p.copy_(torch.linalg.qr(p)[0])
            torch.mm(_matrix(total, m).T, p, out=self._factor(right, m.right))
            if residual is not None:
                _matrix(total, m).sub_(p @ self._factor(right, m.right).T)
            yield None
        if residual is not None:
            torch.div(total, factor, out=residual)
            for part in self._raw:
                residual[part] = 0
        yield Message("sum", right, 1)
        self._right.copy_(right)
        for m in self._matrices:
            mean = self._factor(left, m.left) @ self._factor(right, m.right).T
            _matrix(values, m).copy_(mean.mul_(scale).div_(factor))
            yield None
        sums = torch.split(raw, [part.stop - part.start for part in self._raw])
        for part, summed in zip(self._raw, sums, strict=True):
            values[part] = (summed * scale / factor).to(values.dtype)

    def _start(self, random_key: RandomKey) -> None:
        """Initialise Q with random numbers that are equal on all ranks."""
        low, high = random_key.fixed()
        generator = torch.Generator(device="cpu").manual_seed((high & 0x7FFFFFFF) << 32 | low)
        self._right.copy_(torch.randn(len(self._right), generator=generator, device="cpu"))
        self._started = True

    def _factor(self, flat: Tensor, part: slice) -> Tensor:
        return flat[part].view(-1, self._rank)

    def state_dict(self) -> dict[str, Any]:
        return {"right": self._right.cpu().clone(), "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._right.copy_(state["right"])
        self._started = bool(state["started"])


def _matrix(flat: Tensor, m: _Matrix) -> Tensor:
    return flat[m.start : m.start + m.rows * m.columns].view(m.rows, m.columns)
