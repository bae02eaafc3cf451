"""Top-k: the largest elements of each rank, by all-gather. A control: it cannot be summed by all-reduce."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd.compress.base import Codec, Compressor, Draw, Largest, Message, Stretch, check_count, count_of


class TopK(Compressor):
    """The k largest elements of each rank with their indices, 8 bytes each; biased, so with error feedback.

    Every rank receives those of all others: bytes and work grow with the number of ranks.

    Parameters
    ----------
    k
        Elements of the whole model that a rank sends; default: `ratio` of them.
    ratio
        Share of the elements, above 0, at most 1. Default 0.01.
    """

    def __init__(self, k: int | None = None, ratio: float = 0.01) -> None:
        check_count(k, ratio)
        self.k, self.ratio = k, ratio

    def options(self) -> dict[str, object]:
        return {"k": self.k, "ratio": self.ratio}

    def codec(self, stretch: Stretch) -> Codec:
        return _TopKCodec(stretch, count_of(self.k, self.ratio, stretch) if stretch.numel else 0)


class _TopKCodec(Codec):
    def __init__(self, stretch: Stretch, count: int) -> None:
        self._largest, self._count = Largest(stretch), count
        # Values in the first half of a row and indices in the second, so that one message holds both.
        self._sent = torch.zeros(2 * count, dtype=torch.int32, device=stretch.device)
        self._all = torch.zeros((stretch.terms, 2 * count), dtype=torch.int32, device=stretch.device)
        self.sums = []

    def run(
        self, values: Tensor, buffers: list[Tensor], draw: Draw, scale: float, residual: Tensor | None
    ) -> Iterator[Message | None]:
        yield from self._largest.find(values, residual)
        yield Message("max", self._largest.norm)
        total = values.float() if residual is None else values.float() + residual
        _, indices = torch.topk(total.abs(), self._count, sorted=False)
        self._sent[: self._count] = total[indices].view(torch.int32)
        self._sent[self._count :] = indices
        yield Message("gather", self._sent, gathered=self._all)
        if residual is not None:
            residual.copy_(total)
            residual[indices] = 0
        total.zero_()
        for row in self._all:
            chosen, where = row[: self._count].view(torch.float32), row[self._count :].long()
            total.index_add_(0, where, chosen * scale)
            yield None
        values.copy_(total)
