"""Expected results of compressed reductions on ranks and nodes, computed on one rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpcsgd import TensorGroup, World
from hpcsgd.compress import build
from hpcsgd.compress.base import Compressor, Segment
from hpcsgd.tensors.group import Bucket
from tests.support import compressor_rows as c
from tests.support.collective_cases import same_bits
from tests.support.simulated_codecs import Lockstep, NotFinite

SEED = 5


def inside(bucket: Bucket) -> Tensor:
    """Return a mask of the elements that belong to a tensor; the others are gaps."""
    mask = torch.zeros(bucket.numel, dtype=torch.bool, device="cpu")
    for view in bucket.views:
        start = view.storage_offset() - bucket.flat.storage_offset()
        mask[start : start + view.numel()] = True
    return mask


def contribution(bucket: Bucket, rank: int, salt: int = 0) -> Tensor:
    """Return the input of a rank: multiples of 1/64, which add up exactly in any order; a few are large."""
    generator = torch.Generator("cpu").manual_seed(1000 * salt + 100 * rank + bucket.index)
    numbers = torch.randn(bucket.numel, generator=generator, device="cpu").mul(8).round()
    numbers[:: 50 + rank] *= 10
    return (numbers * inside(bucket) / 64).to(bucket.flat.dtype)


def fill(group: TensorGroup, salt: int = 0) -> None:
    for bucket in group:
        bucket.flat.copy_(contribution(bucket, group.world.rank, salt))


class Simulated:
    """All ranks' reduction of a group; collective when made.

    Parameters
    ----------
    by_node
        Whether nodes add up float32 first.
    """

    def __init__(self, group: TensorGroup, row: c.Row, by_node: bool) -> None:
        world: World = group.world
        self.group, self.row, self.size = group, row, world.size
        self.nodes = world.gather(world.node)
        self.by_node = by_node
        self._total = sum(bucket.numel for bucket in group)
        parts = world.rings if by_node else 1
        terms = world.nodes if by_node else world.size
        compressor = build(row.spec)
        assert compressor is not None
        self.feedback = compressor.feedback
        self.locks = {
            (bucket.index, index): self._lock(compressor, bucket, bucket.part(index, parts), terms)
            for bucket in group
            for index in range(parts)
        }

    def _lock(self, compressor: Compressor, bucket: Bucket, part: slice, terms: int) -> Lockstep:
        size, tensors = part.stop - part.start, []
        for view in bucket.views:
            start = view.storage_offset() - bucket.flat.storage_offset() - part.start
            if start >= 0 and start + view.numel() <= size:
                tensors.append((start, tuple(view.shape)))
        segment = Segment(size, terms, part.start, size / self._total, tuple(tensors))
        return Lockstep(compressor, segment, self.feedback, SEED, bucket.index)

    def reduce(
        self, step: int, scale: float, salt: int = 0, bad: tuple[int, int] = (-1, -1)
    ) -> Iterator[Tensor]:
        """Each bucket's result; NaN where `bad`, a bucket and a rank, has one as its first element."""
        for bucket in self.group:
            rows = torch.stack([contribution(bucket, rank, salt) for rank in range(self.size)])
            if bad[0] == bucket.index:
                rows[bad[1], 0] = torch.nan
            if self.by_node:
                rows, factor = self._sum_nodes(rows, scale), 1.0
            else:
                factor = scale
            yield torch.cat([self._reduce_part(lock, rows, step, factor) for lock in self._parts_of(bucket)])

    def _sum_nodes(self, rows: Tensor, scale: float) -> Tensor:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        sums = [wide[[node == n for n in self.nodes]].sum(0) for node in sorted(set(self.nodes))]
        return (torch.stack(sums) * scale).to(rows.dtype)

    def _parts_of(self, bucket: Bucket) -> list[tuple[Lockstep, slice]]:
        parts = len(self.locks) // len(self.group)
        return [(self.locks[bucket.index, index], bucket.part(index, parts)) for index in range(parts)]

    def _reduce_part(self, place: tuple[Lockstep, slice], rows: Tensor, step: int, factor: float) -> Tensor:
        lock, part = place
        if lock.segment.terms == 1:
            return rows[0, part]  # one node: nothing is compressed
        try:
            return lock.reduce(rows[:, part].contiguous(), step, factor)[0]
        except NotFinite:
            return torch.full((part.stop - part.start,), torch.nan, dtype=rows.dtype, device="cpu")

    def bytes_sent(self) -> float:
        """By all ranks in one reduction."""
        return sum(lock.segment.terms * self.row.bytes_per_rank(lock.segment) for lock in self.locks.values())

    def check(self, results: Iterator[Tensor]) -> None:
        """Compare with the group: bit for bit, or approximately where the order of the sum matters.

        All ranks must have the same bits; only rank 0 computes the results, which takes as long as all ranks.
        """
        assert same_bits(self.group), self.row
        for bucket, result in zip(self.group, results, strict=True) if self.group.world.rank == 0 else ():
            mask = inside(bucket)
            actual, expected = bucket.flat.cpu()[mask], result[mask]
            size = float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
            error = 1e-4 if self.row.mixes else 4 * self.size * self.row.precision
            error = 0.0 if self.row.words else error
            torch.testing.assert_close(actual, expected, rtol=error, atol=error * size, equal_nan=True)
