"""Every all-reduce algorithm, layout of ranks and dtype against NumPy; the other collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd import BadOption
from hpcsgd import collectives as c
from hpcsgd.collectives import ring
from tests.support.collective_cases import (
    DTYPES,
    LAYOUTS,
    NAMES,
    SUBCHUNK_BYTES,
    expected_sum,
    fill,
    fits,
    group_of,
    lengths,
    random_numbers,
    same_bits,
    values,
)

pytestmark = pytest.mark.mpi
WorldOf = Callable[..., Any]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_algorithm = pytest.mark.parametrize("algorithm", NAMES)


@pytest.fixture(autouse=True)
def small_subchunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_SUBCHUNK_BYTES", SUBCHUNK_BYTES)


@each_layout
@each_algorithm
@each_dtype
def test_allreduce_equals_numpy(
    world_of: WorldOf, layout: tuple[int, bool], algorithm: str, dtype: torch.dtype
) -> None:
    world = world_of(*layout)
    group = group_of(world, lengths(world.size, dtype), dtype)
    fill(group, world.rank)
    if not fits(group, algorithm):
        with pytest.raises(BadOption, match=f"{algorithm}.*does not fit"):
            c.allreduce(group, 1.0, algorithm)
        return
    c.allreduce(group, 1.0, algorithm)
    for view, expected in expected_sum(group):
        np.testing.assert_array_equal(values(view), expected)
    assert same_bits(group)
    for view, _ in expected_sum(group):
        numbers = random_numbers(world.rank, view.numel(), dtype)
        view.copy_(torch.from_numpy(numbers))
    c.iallreduce(group, algorithm=algorithm).wait()
    for view in group.views.values():
        every = [random_numbers(r, view.numel(), dtype) for r in range(world.size)]
        error = np.abs(values(view) - np.mean(every, axis=0))
        bound = world.size * torch.finfo(dtype).eps * np.sum(np.abs(every), axis=0)
        assert np.all(error <= bound + torch.finfo(dtype).smallest_normal)
    assert same_bits(group)


@each_layout
def test_mean_of_large_halves_does_not_overflow(world_of: WorldOf, layout: tuple[int, bool]) -> None:
    world = world_of(*layout)
    group = group_of(world, [100], torch.float16)
    for algorithm in filter(lambda name: fits(group, name), NAMES):
        group.buckets[0].flat.fill_(60000)
        c.allreduce(group, algorithm=algorithm)
        np.testing.assert_allclose(values(group.buckets[0].flat), 60000, rtol=2e-3)


@each_layout
def test_many_in_flight(world_of: WorldOf, layout: tuple[int, bool]) -> None:
    world = world_of(*layout)
    groups = [group_of(world, [1 + 37 * i, 3], DTYPES[i % 4]) for i in range(50)]
    for algorithm in filter(lambda name: fits(groups[0], name), NAMES):
        for group in groups:
            fill(group, world.rank)
        works = [c.iallreduce(group, 1.0, algorithm) for group in groups]
        for work, group in reversed(list(zip(works, groups, strict=True))):
            work.wait()
            assert work.test()
            for view, expected in expected_sum(group):
                np.testing.assert_array_equal(values(view), expected)


@each_layout
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool, torch.uint8], ids=str)
def test_broadcast_from_every_root(world_of: WorldOf, layout: tuple[int, bool], dtype: torch.dtype) -> None:
    world = world_of(*layout)
    group = group_of(world, [0, 1, 17, 5000], dtype)
    for root in range(world.size):
        for view in group.views.values():
            view.fill_((world.rank + 1) % 2 if dtype is torch.bool else world.rank + 1)
        c.broadcast(group, root)
        for view in group.views.values():
            assert torch.all(view == ((root + 1) % 2 if dtype is torch.bool else root + 1))


@each_layout
@each_dtype
def test_reduce_scatter_and_allgather_are_an_allreduce(
    world_of: WorldOf, layout: tuple[int, bool], dtype: torch.dtype
) -> None:
    world = world_of(*layout)
    group = group_of(world, lengths(world.size, dtype), dtype)
    fill(group, world.rank)
    c.reduce_scatter(group, 1.0)
    for bucket, (_, expected) in zip(group, expected_sum(group), strict=True):
        own = bucket.part(world.rank, world.size)
        scattered = values(bucket.flat[own])
        padded = np.zeros(bucket.numel)
        padded[: expected.size] = expected
        np.testing.assert_array_equal(scattered, padded[own])
        for rank in range(world.size):
            if rank != world.rank:
                bucket.flat[bucket.part(rank, world.size)] = -1
    world.gather("all have overwritten the rest")
    c.allgather(group)
    for view, expected in expected_sum(group):
        np.testing.assert_array_equal(values(view), expected)
    assert same_bits(group)


@each_dtype
def test_separate_device_memory(world: Any, dtype: torch.dtype) -> None:
    group = group_of(world, [0, 1, 1000], dtype, staged=True)
    fill(group, world.rank)
    assert all(b.flat.data_ptr() != b.host.data_ptr() for b in group if b.numel)
    c.iallreduce(group, 1.0).wait()
    for view, expected in expected_sum(group):
        np.testing.assert_array_equal(values(view), expected)
    fill(group, world.rank)
    c.broadcast(group, world.size - 1)
    assert same_bits(group)


@each_layout
@each_algorithm
def test_bytes_equal_the_formula(world_of: WorldOf, layout: tuple[int, bool], algorithm: str) -> None:
    world = world_of(*layout)
    group = group_of(world, [5040 * 16], torch.float32)  # 5040 lines: a whole number for each rank
    if not fits(group, algorithm) or world.size == 1:
        pytest.skip("the layout does not allow it")
    name = c.choose_algorithm(group.buckets[0]) if algorithm == "auto" else algorithm
    p, size = world.size, group.nbytes
    ring = 2 * (p - 1) * size // p
    inside, nodes = world.local_size, world.nodes
    slice_bytes = size // world.rings if world.internode else 0
    expected = {
        "library": (ring, 0),
        "ring": (ring, 0),
        "node": (0, 2 * (p - 1) * size // p),
        "two-level": (2 * (nodes - 1) * slice_bytes // nodes, 2 * (inside - 1) * slice_bytes),
    }
    before = (world.traffic.sent, world.traffic.shared)
    c.allreduce(group, algorithm=algorithm)
    after = (world.traffic.sent, world.traffic.shared)
    assert (after[0] - before[0], after[1] - before[1]) == expected[name]


def test_a_scale_is_applied_once(world: Any) -> None:
    group = group_of(world, [1000], torch.float64)
    for algorithm in filter(lambda name: fits(group, name), NAMES):
        group.buckets[0].flat.fill_(world.rank + 1)
        c.allreduce(group, 0.5, algorithm)
        assert torch.all(group.buckets[0].flat == world.size * (world.size + 1) / 4)


def test_a_bucket_alone(world: Any) -> None:
    group = group_of(world, [10, 20, 30], torch.float32)
    fill(group, world.rank)
    c.allreduce(group.buckets[1], 1.0)
    (first, _), (second, expected), (third, _) = expected_sum(group)
    np.testing.assert_array_equal(values(second), expected)
    own = group_of(world, [10, 20, 30], torch.float32)
    fill(own, world.rank)
    assert torch.equal(first, own.views["t0"]) and torch.equal(third, own.views["t2"])


def test_an_empty_group(world: Any) -> None:
    group = group_of(world, [], torch.float32)
    c.allreduce(group)
    assert c.iallreduce(group).wait() is None


def test_misuse_is_an_error_on_all_ranks(world: Any) -> None:
    group = group_of(world, [4], torch.float32)
    with pytest.raises(BadOption, match="unknown all-reduce algorithm 'rign'") as error:
        c.allreduce(group, algorithm="rign")
    assert all(name in str(error.value) for name in NAMES)
    for root in (-1, world.size):
        with pytest.raises(BadOption, match="root of a broadcast"):
            c.broadcast(group, root)
    integers = group_of(world, [4], torch.int64)
    for misuse in (c.allreduce, c.iallreduce, c.reduce_scatter, c.ireduce_scatter):
        with pytest.raises(BadOption, match="t0 has a dtype that cannot be averaged"):
            misuse(integers)
    with pytest.raises(BadOption, match="'bucket_mib'"):
        group_of_size(world, 0)
    c.allreduce(group)  # the ranks are still in step


def group_of_size(world: Any, mib: float) -> None:
    from hpcsgd import TensorGroup

    TensorGroup(world, [("a", torch.zeros(1))], mib)
