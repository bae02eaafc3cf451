"""Windows of device memory: who sees which, when they are freed, and what happens without them."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsgd import Disagreement, World
from hpcsgd.collectives import allreduce
from hpcsgd.tensors.group import TensorGroup
from hpcsgd.tensors.weighted_sum import weighted_sum
from tests.support import device_cases as cases

pytestmark = [pytest.mark.standin, pytest.mark.mpi(min_size=2)]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture
def own(world: Any) -> Iterator[Any]:
    """A world of the stand-in, for one test."""
    with cases.world_on("standin", "windows") as own:
        yield own


def group_on(world: Any, numel: int = 1000, dtype: torch.dtype = torch.float32) -> TensorGroup:
    return TensorGroup(world, [("w", torch.empty(numel, dtype=dtype, device="cpu"))])


@pytest.fixture
def windows_here() -> Callable[[], int]:
    """Counts the allocations and mappings of this process since the start of the test."""
    from tests.support.standin import windows

    before = set(windows.sizes)
    return lambda: len(set(windows.sizes) - before)


def values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(numel, generator=generator, device="cpu").to(dtype)


def test_each_rank_reads_and_writes_the_memory_of_all(own: Any) -> None:
    rows = own.local.allocate_on_device(512, own.device)
    assert rows is not None and len(rows) == own.size and not any(row.cpu().any() for row in rows)
    own.gather(None)
    for row in rows:
        row[own.rank] = own.rank + 1
    row.cpu()
    own.gather(None)
    for row in rows:
        assert row[: own.size].tolist() == list(range(1, own.size + 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 33, 5000])
def test_a_mean_in_windows_has_the_bits_of_the_host(own: Any, dtype: torch.dtype, numel: int) -> None:
    found = []
    with cases.world_on("cpu", "windows") as host:
        for world in (own, host):
            group = group_on(world, numel, dtype)
            assert group.buckets[0].windowed == (world is own)
            group.views["w"].copy_(values(world.rank, numel, dtype))
            allreduce(group)
            found.append(group.views["w"].cpu().clone())
    assert torch.equal(found[0].view(torch.uint8), found[1].view(torch.uint8))


def test_dropped_windows_are_freed_when_all_ranks_have_dropped_them(
    own: Any, windows_here: Callable[[], int]
) -> None:
    kept = group_on(own)
    dropped = group_on(own)
    assert windows_here() == 2 * own.size
    if own.rank == 0:
        del dropped
        gc.collect()
    other = group_on(own)
    assert windows_here() == 3 * own.size, "rank 0 alone has dropped it"
    dropped = other
    del other
    gc.collect()
    last = group_on(own)
    assert windows_here() == 3 * own.size, "all have dropped one"
    for group in (kept, dropped, last):
        group.views["w"].fill_(own.rank)
        allreduce(group)
        assert float(group.views["w"][0]) == pytest.approx((own.size - 1) / 2)


def test_a_model_outlives_the_windows_of_its_world(windows_here: Callable[[], int]) -> None:
    with cases.world_on("standin", "windows") as own:
        views = group_on(own).views
        views["w"].fill_(own.rank + 3)
        rank = own.rank
    assert windows_here() == 1, "its own memory, and none of other ranks"
    assert views["w"].tolist() == [rank + 3] * 1000
    views.clear()
    gc.collect()
    assert windows_here() == 0


def test_windows_of_a_world_that_all_ranks_have_left_are_freed(windows_here: Callable[[], int]) -> None:
    own = cases.world_on("standin", "windows")
    group = group_on(own)
    allreduce(group)
    assert windows_here() == own.size
    own.leave("the test wants it")
    del group
    gc.collect()
    end = time.monotonic() + 20
    while windows_here() and time.monotonic() < end:
        time.sleep(0.01)
    assert windows_here() == 0


def test_without_access_to_a_peer_buckets_are_staged_with_one_warning(own: Any) -> None:
    from tests.support.standin import windows

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            windows.refused[0] = int(own.rank == own.size - 1)
            group = group_on(own)
            assert not group.buckets[0].windowed and group.buckets[0].rows
            group.views["w"].fill_(own.rank)
            allreduce(group)
            assert float(group.views["w"][0]) == pytest.approx((own.size - 1) / 2)
    found = [str(each.message) for each in caught if "device memory" in str(each.message)]
    assert len(found) == (own.rank == 0)
    assert not found or "peer access is not supported" in found[0]
    assert group_on(own).buckets[0].windowed, "what could not be mapped is freed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weighted_sums_have_the_same_bits_without_cupy(
    own: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    found = []
    for has_kernels in (True, False):
        monkeypatch.setattr("hpcsgd.kernels.cuda_loader.is_available", lambda has=has_kernels: has)
        terms = [(values(number, 5000, dtype).to(own.device), 0.3 * number + 0.1) for number in range(3)]
        weighted_sum(terms[1][0], terms)
        found.append(terms[1][0].cpu())
    assert torch.equal(*found)


def test_a_single_rank_scales_its_bucket_where_it_is() -> None:
    from mpi4py import MPI

    with World(MPI.COMM_SELF, device="standin", timeout=20) as alone:
        group = group_on(alone)
        group.views["w"].fill_(4)
        allreduce(group, 0.25)
        assert group.views["w"].tolist() == [1.0] * 1000
        assert not group.buckets[0].host.any(), "nothing was copied to the host"


def test_ranks_on_the_cpu_and_others_are_an_error(world: Any) -> None:
    with pytest.raises(Disagreement, match=r"kind of device .* differs from that of rank 0"):
        cases.world_on("standin" if world.rank else "cpu", "windows")


def test_a_rank_that_wants_no_windows_decides_for_its_node(
    monkeypatch: pytest.MonkeyPatch, world: Any
) -> None:
    monkeypatch.setenv("HPCSGD_DEVICE_WINDOWS", str(int(world.rank > 0)))
    with cases.world_on("standin", "windows") as own:
        assert not group_on(own).buckets[0].windowed
