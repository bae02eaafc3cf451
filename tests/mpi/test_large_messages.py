"""Messages above the largest count of MPI: sent in parts, and equal to those in one."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd import DSGD, AllReduce, LocalSGD, Run
from hpcsgd.mpi import large_messages
from hpcsgd.mpi.communicator import Communicator
from tests.support.launch import launch

LARGEST = 1024  # bytes


@pytest.fixture
def comm(world: Any, monkeypatch: pytest.MonkeyPatch) -> Communicator:
    monkeypatch.setattr(large_messages, "LARGEST", LARGEST)
    return world.all.dup("a test of large messages")  # type: ignore[no-any-return]


def numbers(rank: int, count: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(rank).integers(-1000, 1000, count).astype(dtype)


def test_parts_cover_a_buffer_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_messages, "LARGEST", LARGEST)
    for array in (numbers(0, 1000), numbers(0, 1000, np.float64), numbers(0, 1000).reshape(10, 100)):
        parts = large_messages.parts(array)
        assert max(part.nbytes for part in parts) <= LARGEST and len(parts) > 1
        assert np.array_equal(np.concatenate(parts), array.reshape(-1))
        assert all(np.shares_memory(part, array) for part in parts)


@pytest.mark.mpi
@pytest.mark.parametrize("count", [1, 256, 257, 5000])
def test_each_operation_in_parts(comm: Communicator, count: int) -> None:
    rank, size, ranks = comm.rank, comm.size, range(comm.size)
    for dtype in (np.float32, np.float64, np.uint32):
        buffer = numbers(rank, count, dtype)
        comm.allreduce(buffer, "a test")
        assert np.array_equal(buffer, sum(numbers(r, count, dtype) for r in ranks))
    received, sent = np.zeros(count, np.float32), numbers(rank, count)
    requests = [comm.irecv(received, (rank - 1) % size, 7), comm.isend(sent, (rank + 1) % size, 7)]
    for request in requests:
        comm.wait(request, "a test")
    assert np.array_equal(received, numbers((rank - 1) % size, count))
    rows = np.zeros((size, count), np.float32)
    comm.wait(comm.iallgather(numbers(rank, count), rows), "a test")
    assert all(np.array_equal(rows[r], numbers(r, count)) for r in ranks)
    root = size - 1
    buffer = numbers(rank, count)
    comm.wait(comm.ibroadcast(buffer, root), "a test")
    assert np.array_equal(buffer, numbers(root, count))
    objects = comm.gather_objects(bytes(count * (rank + 1)), "a test")
    assert [len(each) for each in objects] == [count * (r + 1) for r in ranks]


@pytest.mark.mpi
@pytest.mark.parametrize("make", [AllReduce, lambda: LocalSGD(1), lambda: DSGD("ring")])
def test_training_in_parts_equals_that_in_one(world_of: Any, make: Any, monkeypatch: Any) -> None:
    world, models = world_of(0, False), []
    for largest in (2**30, LARGEST):
        monkeypatch.setattr(large_messages, "LARGEST", largest)
        torch.manual_seed(0)
        model = torch.nn.Linear(60, 60)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with Run(model, optimizer, make(), comm=world, algorithm="library") as run:
            for step in range(3):
                run.zero_grad()
                model(torch.full((2, 60), float(world.rank + step))).square().mean().backward()
                run.step()
            models.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *models))


LARGE = """
import torch, hpcsgd
from hpcsgd import collectives
world = hpcsgd.World()
COUNT, MIDDLE = 600_000_000, 2**29 + 3
template = torch.empty(COUNT, device="meta")
group = hpcsgd.TensorGroup(world, [("a", template)])
def fill(*values):
    group.views["a"].zero_()
    for index, value in zip((0, MIDDLE, -1), values):
        group.views["a"][index] = value
def check(tensor, *values):
    found = [float(tensor[index]) for index in (0, MIDDLE, -1)]
    assert found == list(values), (found, values)
    assert int(torch.count_nonzero(tensor)) == sum(value != 0 for value in values)
for algorithm in ("library", "auto"):
    fill(world.rank + 1, world.rank + 2, 5 * world.rank)
    collectives.allreduce(group, 1.0, algorithm)
    check(group.views["a"], 3, 5, 5)
fill(*[world.rank + 1] * 3)
collectives.broadcast(group, 1)
check(group.views["a"], 2, 2, 2)
del group
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(COUNT))
model = Model()
model.weight.data[-1] = 5 * (world.rank == 0)
run = hpcsgd.Run(model, torch.optim.SGD(model.parameters(), 1.0, foreach=False), STRATEGY, comm=world)
model.weight.grad = torch.zeros(COUNT)
model.weight.grad[0], model.weight.grad[-1], model.weight.grad[MIDDLE] = 1, 2 * world.rank, world.rank
run.step()
check(model.weight.detach(), -1, -0.5, 4)
print("right", flush=True)
"""


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shared", ["0", "1"])
@pytest.mark.parametrize("strategy", ["hpcsgd.LocalSGD(1)", "hpcsgd.DSGD('ring')"])
def test_a_tensor_above_2_gib(strategy: str, shared: str) -> None:
    """On 2 ranks, which need 18 GiB of memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 18 * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB of memory are free")
    script = LARGE.replace("STRATEGY", strategy)
    job = launch(script, 2, timeout=400, env={"HPCSGD_SHARED_MEMORY": shared}, shm="12g")
    assert job.returncode == 0 and job.stdout.count("right") == 2, job
