"""Scaled signs, one bit an element, by all-gather: a baseline, because all-reduce cannot sum signs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Message, RandomKey, Segment, chunks


class SignSGD(Compressor):
    """Mean over the ranks of sign(x) * mean|x|; biased, so use it with `ErrorFeedback`.

    One bit an element and one float32 a segment, gathered from all ranks: bytes and work grow with the number
    of ranks. Bernstein et al., arXiv 1802.04434, with the scale of Karimireddy et al., arXiv 1901.09847. Our
    reading: the sign of zero is plus.
    """

    def codec(self, segment: Segment) -> Codec:
        return _SignCodec(segment)


class _SignCodec(Codec):
    def __init__(self, segment: Segment) -> None:
        device = segment.device
        super().__init__(segment)
        self._bytes = -(-segment.numel // 8)
        self._packed = torch.zeros(4 + self._bytes, dtype=torch.uint8, device=device)
        self._gathered = torch.zeros((segment.terms, 4 + self._bytes), dtype=torch.uint8, device=device)
        self._bit_values = 2 ** torch.arange(8, dtype=torch.uint8, device=device)

    def reduce(
        self,
        values: Tensor,
        buffers: list[Tensor],
        random_key: RandomKey,
        scale: float,
        residual: Tensor | None,
    ) -> Iterator[Message | None]:
        total = values.float() if residual is None else values.float() + residual
        mean = total.abs().double().mean() if len(total) else total.sum()
        self._packed[:4] = mean.float().view(1).view(torch.uint8)
        for chunk in chunks(len(values)):
            self._pack(total[chunk], self._packed[4 + chunk.start // 8 :])
            yield None
        yield Message("gather", self._packed, gathered=self._gathered)
        means = self._gathered[:, :4].flatten().view(torch.float32).unsqueeze(1) * scale
        own_mean = float(mean.float())
        for chunk in chunks(len(values)):
            signs = self._unpack(chunk)
            if residual is not None:
                decoded = torch.where(total[chunk] < 0, -own_mean, own_mean)
                residual[chunk] = total[chunk] - decoded
            values[chunk] = (signs * means).sum(0).to(values.dtype)
            yield None

    def _pack(self, total: Tensor, target: Tensor) -> None:
        bits = torch.zeros(-(-len(total) // 8) * 8, dtype=torch.uint8, device=total.device)
        bits[: len(total)] = total < 0
        packed = (bits.view(-1, 8) * self._bit_values).sum(1, dtype=torch.uint8)
        target[: len(packed)] = packed

    def _unpack(self, chunk: slice) -> Tensor:
        """Return +1 and -1, (terms, elements of the chunk)."""
        packed = self._gathered[:, 4 + chunk.start // 8 : 4 + -(-chunk.stop // 8)]
        bits = (packed.unsqueeze(2) & self._bit_values).ne(0).flatten(1)[:, : chunk.stop - chunk.start]
        return torch.where(bits, -1.0, 1.0)
