"""PowerSGD: gradients of matrices as products of two thin ones, which all-reduce can add."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Draw, Largest, Message, Stretch
from hpcsgd.errors import BadOption


class PowerSGD(Compressor):
    """Rank-r factors by one step of subspace iteration, started from those of the step before.

    P = sum of M_i Q, orthogonalised; Q = sum of M_i^T P; the result is P Q^T. Biased, so use
    `ErrorFeedback`. Tensors of one dimension, and small ones, are sent as they are, with P. Vogels et al.,
    arXiv 1905.13727; the residual is M_i minus what this rank's own factors say.

    Parameters
    ----------
    rank
        Columns of the factors, at least 1. Default 2.
    """

    whole = True

    def __init__(self, rank: int = 2) -> None:
        if rank < 1:
            raise BadOption("rank of PowerSGD", expected="at least 1", got=rank)
        self.rank = rank

    def options(self) -> dict[str, object]:
        return {"rank": self.rank}

    def codec(self, stretch: Stretch) -> Codec:
        return _PowerCodec(stretch, self.rank)


@dataclass
class _Matrix:
    """Where a matrix and its factors begin: in the stretch, and in the flat factors P and Q."""

    start: int
    rows: int
    columns: int
    left: slice
    right: slice


class _PowerCodec(Codec):
    def __init__(self, stretch: Stretch, rank: int) -> None:
        self._rank, self._terms = rank, stretch.terms
        self._largest = Largest(stretch)
        self._matrices: list[_Matrix] = []
        self._raw: list[slice] = []
        left = right = end = 0
        for start, shape in stretch.tensors:
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
        self._raw.append(slice(end, stretch.numel))
        raw = sum(piece.stop - piece.start for piece in self._raw)
        self._right = torch.zeros(right, device=stretch.device)
        self._started = False
        self._left_size = left
        self.sums = [(left + raw, torch.float32), (right, torch.float32)]

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        left, raw, right = buffers[0][: self._left_size], buffers[0][self._left_size :], buffers[1]
        yield from self._largest.find(values, residual)
        yield Message("max", self._largest.norm)
        if not self._started:
            self._start(draw)
        # Brought near 1 over all ranks, so that products neither overflow nor underflow.
        factor = 2.0 ** -min(self._largest.exponent() + self._terms.bit_length(), 126)
        total = (values.float() if residual is None else values.float() + residual) * factor
        for m in self._matrices:
            torch.mm(_of(total, m), self._factor(self._right, m.right), out=self._factor(left, m.left))
            yield None
        if len(raw):
            torch.cat([total[piece] for piece in self._raw], out=raw)
        yield Message("sum", buffers[0], 0)
        for m in self._matrices:
            p = self._factor(left, m.left)
            p.copy_(torch.linalg.qr(p)[0])
            torch.mm(_of(total, m).T, p, out=self._factor(right, m.right))
            if residual is not None:
                _of(total, m).sub_(p @ self._factor(right, m.right).T)
            yield None
        if residual is not None:
            torch.div(total, factor, out=residual)
            for piece in self._raw:
                residual[piece] = 0
        yield Message("sum", right, 1)
        self._right.copy_(right)
        for m in self._matrices:
            mean = self._factor(left, m.left) @ self._factor(right, m.right).T
            _of(values, m).copy_(mean.mul_(scale).div_(factor))
            yield None
        sent = torch.split(raw, [piece.stop - piece.start for piece in self._raw])
        for piece, summed in zip(self._raw, sent, strict=True):
            values[piece] = (summed * scale / factor).to(values.dtype)

    def _start(self, draw: Draw) -> None:
        """The same random factors on every rank."""
        low, high = draw.lasting()
        generator = torch.Generator().manual_seed((high & 0x7FFFFFFF) << 32 | low)
        self._right.copy_(torch.randn(len(self._right), generator=generator))
        self._started = True

    def _factor(self, flat: Tensor, part: slice) -> Tensor:
        return flat[part].view(-1, self._rank)

    def state_dict(self) -> dict[str, Any]:
        return {"right": self._right.cpu().clone(), "started": self._started}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._right.copy_(state["right"])
        self._started = bool(state["started"])


def _of(flat: Tensor, m: _Matrix) -> Tensor:
    return flat[m.start : m.start + m.rows * m.columns].view(m.rows, m.columns)
