"""Scaled signs, one bit an element, by all-gather. A control: signs cannot be summed by all-reduce."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Draw, Largest, Message, Stretch, pieces


class SignSGD(Compressor):
    """The mean of sign(x) * mean|x| over the ranks; biased, so with error feedback.

    One bit an element and one float32 a stretch, gathered from all ranks: bytes and work grow with the
    number of ranks. Bernstein et al., arXiv 1802.04434; with the scale of Karimireddy et al., arXiv
    1901.09847. The sign of zero is plus.
    """

    def codec(self, stretch: Stretch) -> Codec:
        return _SignCodec(stretch)


class _SignCodec(Codec):
    def __init__(self, stretch: Stretch) -> None:
        device = stretch.device
        self._largest = Largest(stretch)
        self._bytes = -(-stretch.numel // 8)
        self._sent = torch.zeros(4 + self._bytes, dtype=torch.uint8, device=device)
        self._all = torch.zeros((stretch.terms, 4 + self._bytes), dtype=torch.uint8, device=device)
        self._places = 2 ** torch.arange(8, dtype=torch.uint8, device=device)
        self.sums = []

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        yield from self._largest.find(values, residual)
        yield Message("max", self._largest.norm)
        total = values.float() if residual is None else values.float() + residual
        size = total.abs().double().mean() if len(total) else total.sum()
        self._sent[:4] = size.float().view(1).view(torch.uint8)
        for piece in pieces(len(values)):
            self._pack(total[piece], self._sent[4 + piece.start // 8 :])
            yield None
        yield Message("gather", self._sent, gathered=self._all)
        sizes = self._all[:, :4].flatten().view(torch.float32).unsqueeze(1) * scale
        own = float(size.float())
        for piece in pieces(len(values)):
            signs = self._unpack(piece)
            if residual is not None:
                mine = torch.where(total[piece] < 0, -own, own)
                residual[piece] = total[piece] - mine
            values[piece] = (signs * sizes).sum(0).to(values.dtype)
            yield None

    def _pack(self, total: Tensor, target: Tensor) -> None:
        bits = torch.zeros(-(-len(total) // 8) * 8, dtype=torch.uint8, device=total.device)
        bits[: len(total)] = total < 0
        packed = (bits.view(-1, 8) * self._places).sum(1, dtype=torch.uint8)
        target[: len(packed)] = packed

    def _unpack(self, piece: slice) -> Tensor:
        """+1 and -1, (terms, elements of the piece)."""
        packed = self._all[:, 4 + piece.start // 8 : 4 + -(-piece.stop // 8)]
        bits = (packed.unsqueeze(2) & self._places).ne(0).flatten(1)[:, : piece.stop - piece.start]
        return torch.where(bits, -1.0, 1.0)
