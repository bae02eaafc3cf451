"""World and Run on ranks: consistency checks, sub-communicators, shared memory that is freed."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import (
    AllReduce,
    BadOption,
    Disagreement,
    HpcsgdError,
    LocalSGD,
    Run,
    TensorGroup,
    World,
    collectives,
)

pytestmark = pytest.mark.mpi
RUNS = 15


def net(first: str = "a", dtype: torch.dtype = torch.float32, width: int = 3) -> nn.Module:
    model = nn.Module()
    for name in (first, "b"):
        model.register_parameter(name, nn.Parameter(torch.zeros(width, 2, dtype=dtype)))
    return model


def start(world: Any, model: nn.Module, strategy: Any = None, **options: Any) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return Run(model, optimizer, strategy, comm=world, **options)


class Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(3, 2))
        self.a = nn.Parameter(torch.zeros(3, 2))


def frozen() -> nn.Module:
    model = net()
    model.get_parameter("b").requires_grad_(False)
    return model


def test_a_size_of_buckets_that_is_no_number_is_an_error(world: Any) -> None:
    with pytest.raises(BadOption, match="'bucket_mib' of Run has a wrong value"):
        start(world, net(), bucket_mib=float("nan"))
    with start(world, net(), bucket_mib=float("inf")) as run:
        assert len(run.strategy.gradients.group) <= 1  # one rank has none


@pytest.mark.mpi(min_size=2)
def test_ranks_that_give_mpi_device_memory_and_others_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpi4py import MPI

    monkeypatch.setenv("HPCSGD_CUDA_AWARE", str(int(MPI.COMM_WORLD.rank == 0)))
    with pytest.raises(Disagreement, match="HPCSGD_CUDA_AWARE differs from that of rank 0"):
        World(timeout=20, device="cpu")


INCONSISTENT: dict[str, tuple[Callable[[Any], Run], str]] = {
    "shape": (lambda w: start(w, net(width=4)), r"a \(4, 2\)"),
    "name": (lambda w: start(w, net("c")), r"c \(3, 2\)"),
    "dtype": (lambda w: start(w, net(dtype=torch.float64)), "torch.float64"),
    "order": (lambda w: start(w, Swapped()), r"b \(3, 2\).* at position 0"),
    "frozen": (lambda w: start(w, frozen()), "b .* fixed"),
    "strategy": (lambda w: start(w, net(), LocalSGD()), "LocalSGD"),
    "bucket": (lambda w: start(w, net(), bucket_mib=1), "bucket_mib"),
    "algorithm": (lambda w: start(w, net(), algorithm="ring"), "algorithm"),
    "unused": (lambda w: start(w, net(), unused="error"), "unused"),
    "uneven": (lambda w: start(w, net(), uneven="stop"), "uneven"),
    "buffers": (lambda w: start(w, net(), buffers="local"), "buffers"),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("field", INCONSISTENT)
def test_inconsistent_ranks_raise_on_all_ranks(world: Any, field: str) -> None:
    begin, text = INCONSISTENT[field]
    with pytest.raises(Disagreement, match=text) as error:
        begin(world) if world.rank == 1 else start(world, net(), AllReduce())
    assert str(error.value).startswith("rank 1: ") and "(rank 0)" in str(error.value)


@pytest.mark.mpi(min_size=2)
def test_options_of_a_strategy_are_checked(world: Any) -> None:
    with pytest.raises(Disagreement, match="period") as error:
        start(world, net(), LocalSGD(8 if world.rank else 4))
    ranks = ", ".join(map(str, range(1, world.size)))
    assert f"{ranks}: " in str(error.value).splitlines()[0]


def test_a_communicator_of_the_user(world: Any) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2, MPI.COMM_WORLD.rank)
    model = net()
    with torch.no_grad():
        model.get_parameter("a").fill_(MPI.COMM_WORLD.rank)
    with start(comm, model) as run:
        assert (run.world.rank, run.world.size) == (comm.rank, comm.size)
        assert torch.all(model.get_parameter("a") == MPI.COMM_WORLD.rank % 2)
        model.get_parameter("a").sum().mul(comm.rank).backward()
        run.step()
        assert torch.all(model.get_parameter("a").grad == (comm.size - 1) / 2)
    assert not MPI.Is_finalized()
    assert comm.allreduce(1) == comm.size, "the user's communicator is still valid"
    comm.Free()


def test_close_is_idempotent(world: Any) -> None:
    own = World(timeout=20)
    assert own.gather(own.rank) == list(range(world.size))
    own.close()
    own.close()


def test_a_closed_run_moves_the_model_to_private_memory(world: Any) -> None:
    for strategy in (AllReduce(), LocalSGD(2)):
        model = net()
        run = start(world, model, strategy)
        sum(p.sum() for p in model.parameters()).backward()
        run.step()
        before = [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()]
        values = [p.detach().clone() for p in model.parameters()]
        run.close()
        run.close()
        after = [(p.data_ptr(), p.grad.data_ptr()) for p in model.parameters()]
        moved = 1 if isinstance(strategy, AllReduce) else 0
        if world.size > 1:  # one rank is plain training: nothing of it was shared
            assert all(a[moved] != b[moved] for a, b in zip(after, before, strict=True))
        for parameter, value in zip(model.parameters(), values, strict=True):
            # The mean of n equal models may differ from each by rounding.
            torch.testing.assert_close(parameter.detach(), value)
        model.get_parameter("a").sum().backward()  # no hook is left


def test_a_view_outlives_its_group(world: Any) -> None:
    group = TensorGroup(world, [("a", torch.zeros(1000))])
    group.views["a"].fill_(world.rank)
    view, array = group.views["a"][10:20], group.views["a"].numpy()
    del group
    gc.collect()
    for _ in range(3):
        TensorGroup(world, [("b", torch.zeros(1000))]).views["b"].fill_(-1)
        gc.collect()
    world.gather("all have written")
    assert torch.all(view == world.rank) and np.all(array == world.rank)


def shared_mappings() -> int:
    return sum(" rw-s " in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_runs_on_one_world_free_shared_memory(world: Any) -> None:
    counts = []
    for number in range(RUNS):
        start(world, net(), LocalSGD() if number % 2 else AllReduce()).close()
        gc.collect()
        counts.append(shared_mappings())
    assert max(counts[5:]) <= max(counts[:5]) + 2, counts


def test_runs_with_worlds_of_their_own_free_shared_memory() -> None:
    counts = []
    for _ in range(RUNS):
        start(None, net()).close()
        gc.collect()
        counts.append(shared_mappings())
    assert max(counts[5:]) <= max(counts[:5]) + 2, counts


def test_nodes_are_split_by_ranks_per_node(world_of: Callable[..., Any]) -> None:
    for per_node in (1, 2, 3):
        world = world_of(per_node)
        assert world.nodes == -(-world.size // per_node)
        assert world.node == world.rank // per_node
        assert world.local_rank == world.rank % per_node
        assert world.local.members == [r for r in range(world.size) if r // per_node == world.node]


def test_gather_and_check_consistent(world: Any) -> None:
    assert world.gather({"rank": world.rank}) == [{"rank": r} for r in range(world.size)]
    world.check_consistent({"a": 1, "b": [1, 2]})


@pytest.mark.mpi(min_size=2)
def test_a_second_thread_in_a_gather_gets_an_error(world: Any) -> None:
    from mpi4py import MPI

    if world.rank == 0:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(world.gather(0)))
        thread.start()
        while world.control._thread is None:
            time.sleep(1e-3)
        with pytest.raises(HpcsgdError, match="another thread of this rank is in such a call"):
            world.gather("a part of another message")
    MPI.COMM_WORLD.barrier()  # the others come only now
    if world.rank == 0:
        thread.join()
        assert found == [list(range(world.size))]
    else:
        assert world.gather(world.rank) == list(range(world.size))


def test_overlap_with_the_users_own_mpi(world: Any) -> None:
    from mpi4py import MPI

    group = TensorGroup(world, [("a", torch.zeros(100_000))])
    works = [collectives.iallreduce(group, 1.0, "ring") for _ in range(5)]
    assert MPI.COMM_WORLD.allreduce(world.rank) == sum(range(world.size))
    for work in works:
        work.wait()
