"""Cases of collectives, with results computed by NumPy."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from hpcsgd import TensorGroup, World
from hpcsgd.collectives import ALGORITHMS

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAMES = ["auto", *ALGORITHMS]
#: (ranks on a node, shared memory): all on one node, several nodes, uneven nodes, no shared memory.
LAYOUTS = [(0, True), (1, True), (2, True), (3, True), (0, False)]
#: So small that small buckets have several sub-chunks of the ring.
SUBCHUNK_BYTES = 4096
_ONE_EACH = 1e-9  # MiB: every tensor has a bucket of its own


def lengths(ranks: int, dtype: torch.dtype) -> list[int]:
    """Around a cache line, a kernel's block, a part per rank, and a sub-chunk of the ring."""
    subchunk = SUBCHUNK_BYTES // dtype.itemsize * ranks
    edges = [16, 64, 1024, 1024 * ranks, subchunk, 3 * subchunk]
    return [0, 1, 2, *(edge + off for edge in edges for off in (-1, 0, 1))]


def group_of(world: World, sizes: list[int], dtype: torch.dtype, *, staged: bool = False) -> TensorGroup:
    """A bucket for each size."""
    tensors = [(f"t{i}", torch.empty(n, dtype=dtype)) for i, n in enumerate(sizes)]
    return TensorGroup(world, tensors, _ONE_EACH, staged=staged)


@cache
def small_integers(rank: int, numel: int, seed: int = 0) -> np.ndarray:
    """0 to 12: sums over 16 ranks are exact in every dtype."""
    return (np.arange(numel) * 7 + 3 * rank + seed) % 13.0


@cache
def random_numbers(rank: int, numel: int, dtype: torch.dtype) -> np.ndarray:
    """As float64, but values that `dtype` has."""
    numbers = np.random.default_rng([rank, numel]).standard_normal(numel)
    return torch.from_numpy(numbers).to(dtype).double().numpy(force=True)


def fill(group: TensorGroup, rank: int) -> None:
    for seed, view in enumerate(group.views.values()):
        view.copy_(torch.from_numpy(small_integers(rank, view.numel(), seed)).view(view.shape))


def expected_sum(group: TensorGroup) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Each view, and the sum over ranks of the values of `fill`."""
    for seed, view in enumerate(group.views.values()):
        ranks = range(group.world.size)
        yield view, sum(small_integers(rank, view.numel(), seed) for rank in ranks)


def values(view: Tensor) -> np.ndarray:
    return view.flatten().double().numpy(force=True)


def same_bits(group: TensorGroup) -> bool:
    """Whether all ranks hold the same."""
    own = [zlib.crc32(b.flat.contiguous().view(torch.uint8).numpy(force=True).data) for b in group]
    return all(other == own for other in group.world.gather(own))


def fits(group: TensorGroup, algorithm: str) -> bool:
    """Whether the layout of the ranks allows the algorithm."""
    world = group.world
    if world.size == 1 or algorithm not in ("node", "two-level"):
        return True
    return group.shared and (algorithm == "two-level" or world.nodes == 1)
