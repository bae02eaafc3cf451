"""Runs again and again in one process: closed, left by an exception, dropped; none leaves anything behind."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import (
    ADPSGD,
    DSGD,
    LASGD,
    AllReduce,
    BackupWorkers,
    BadOption,
    HpcsgdError,
    LocalSGD,
    ParameterServer,
    Run,
    World,
)
from hpcsgd.errors import RankLeft
from hpcsgd.mpi import departure

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(90)]
STRATEGIES = (AllReduce, lambda: LocalSGD(2), LASGD, lambda: DSGD("ring"))


class Pruned(Exception):
    pass


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waits for ranks that have left are short, and departures end with the test."""
    monkeypatch.setattr(departure, "_GRACE", 0.3)
    monkeypatch.setattr(departure, "_GRACE_OF_LEFT", 0.1)
    yield
    settle()


def settle() -> None:
    """Wait until all runs that were dropped or left are freed."""
    deadline = time.monotonic() + 20
    gc.collect()
    while any(each.has_thread for each in departure._unfinished):
        assert time.monotonic() < deadline, departure._unfinished
        time.sleep(0.01)
    gc.collect()


def counts() -> dict[str, int]:
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "rw-s" in line]
    named = [line for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")]
    return {
        "threads": sum(thread.name == "hpcsgd" for thread in threading.enumerate()),
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": len(maps),
        "files in /dev/shm": len(named),
        "free communicators": -free_communicators(),
    }


def free_communicators() -> int:
    from mpi4py import MPI

    if MPI.Get_library_version().startswith("Open MPI"):
        return 0  # it has any number
    comm, made = MPI.COMM_WORLD.Dup(), []
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    try:
        while len(made) < 3000:
            made.append(comm.Dup())
    except MPI.Exception:
        pass
    for each in (*made, comm):
        each.Free()
    return len(made)


def start(model: nn.Module, strategy: Any = None, **options: Any) -> Run:
    return Run(model, torch.optim.SGD(model.parameters(), 0.1), strategy, **options)


def train(run: Run, steps: int = 2) -> None:
    for _ in range(steps):
        run.zero_grad()
        run.model(torch.ones(2, 30)).sum().backward()
        run.step()


def closed(number: int, model: nn.Module) -> None:
    with start(model, STRATEGIES[number % 4]()) as run:
        train(run)


def pruned(number: int, model: nn.Module) -> None:
    with pytest.raises(Pruned), start(model, STRATEGIES[number % 4]()) as run:
        train(run)
        raise Pruned


def dropped(number: int, model: nn.Module) -> None:
    train(start(model, STRATEGIES[number % 4]()))


def dropped_in_a_cycle(number: int, model: nn.Module) -> None:
    run: Any = start(model, STRATEGIES[number % 4]())
    train(run)
    run.itself = run


def dropped_within_a_step(number: int, model: nn.Module) -> None:
    run = start(model, STRATEGIES[number % 4]())
    run.model(torch.ones(2, 30)).sum().backward()


def refused(number: int, model: nn.Module) -> None:
    from mpi4py import MPI

    with pytest.raises(BadOption, match="no virtual nodes"):
        start(model, LocalSGD(), virtual_nodes=2 * MPI.COMM_WORLD.size)


def left_by_one(number: int, model: nn.Module) -> None:
    """The last rank leaves, and the others wait for it; each catches its exception."""
    from mpi4py import MPI

    last = MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1
    with pytest.raises(Pruned if last else RankLeft), start(model, AllReduce()) as run:
        train(run)
        if last:
            raise Pruned
        train(run)
        if run.world.size == 1:
            raise RankLeft("not reached by a single rank")


ENDS = (closed, pruned, dropped, dropped_in_a_cycle, dropped_within_a_step, refused)


def run_often(runs: int, extra: int) -> None:
    kept = nn.Linear(30, 30)
    for number in range(12):
        ENDS[number % 6](number // 6, nn.Linear(30, 30))
    settle()
    before = counts()
    for number in range(runs):
        ENDS[number % 6](number // 6, kept if number % 6 == 2 else nn.Linear(30, 30))
        if number % extra == 0:
            left_by_one(number, nn.Linear(30, 30))
    settle()
    # A dropped run of a single rank without a thread is freed by the next one.
    with start(nn.Linear(30, 30)) as run:
        train(run)
    settle()
    after = counts()
    slack = {"file descriptors": 2, "mappings": 2}
    assert all(after[name] <= before[name] + slack.get(name, 0) for name in before), (before, after)


def test_many_runs_leave_nothing_behind() -> None:
    run_often(24, 24)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_450_runs_leave_nothing_behind() -> None:
    run_often(450, 10)


def test_hooks_of_a_dropped_run_do_not_act_on_its_model() -> None:
    model = nn.Linear(30, 30)
    for strategy in (AllReduce(), LocalSGD(2), AllReduce()):
        run = start(model, strategy)
        train(run)
        del run
        gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.zero_grad()
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    for value, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(p, value - 0.1 * 2)


@pytest.mark.mpi(min_size=2)
def test_a_parameter_is_trained_by_one_open_run(world: Any) -> None:
    model, other = nn.Linear(30, 30), nn.Linear(30, 30)
    with start(model, comm=world) as first, start(other, comm=world) as second:
        train(first)
        train(second)
        with pytest.raises(BadOption, match="another Run trains the parameter 'weight'"):
            start(model, comm=world)
        train(first)
    with start(model, comm=world) as run:
        train(run)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["allreduce", "local", "lasgd", "dsgd"])
def test_a_run_beside_another_one_has_a_world_of_its_own(world: Any, strategy: Any) -> None:
    one, other = (
        Run(model, torch.optim.SGD(model.parameters(), 0.1), strategy(), comm=world)
        for model in (nn.Linear(2, 1), nn.Linear(2, 1))
    )
    assert one.world is world
    assert (other.world is world) == (world.size == 1)
    assert (other.world.rank, other.world.size) == (world.rank, world.size)
    for _ in range(5):
        for run in (one, other):
            run.zero_grad()
            run.model(torch.ones(1, 2)).sum().backward()
            run.step()
    for run in (one, other):
        run.close()
    with Run(other.model, other.optimizer, strategy(), comm=world) as alone:
        assert alone.world is world


def test_a_run_that_was_left_is_an_error_where_it_goes_on() -> None:
    model = nn.Linear(30, 30)
    with pytest.raises(Pruned), start(model, AllReduce()) as run:
        train(run)
        raise Pruned("trial 3")
    with pytest.raises(HpcsgdError, match="left after Pruned: trial 3"):
        run.world.gather(1) if run.world.size > 1 else run.world.progress.run("x", lambda: None)
    run.close()
    model(torch.ones(2, 30)).sum().backward()
    run.optimizer.step()


@pytest.mark.parametrize("end", ["dropped", "left"])
@pytest.mark.parametrize("strategy", [lambda: LASGD(1), lambda: ADPSGD("star")], ids=["lasgd", "adpsgd"])
def test_asynchronous_runs_leave_nothing_in_a_world_of_the_user(world: Any, strategy: Any, end: str) -> None:
    with World(timeout=30, device=str(torch.get_default_device())) as own:
        for trial in range(3):
            model = nn.Linear(3, 2)
            run = Run(model, torch.optim.SGD(model.parameters(), 0.1), strategy(), comm=own)
            freed = weakref.ref(run.strategy)
            with contextlib.suppress(Pruned):
                for step, x in enumerate(run.batches([torch.ones(2, 3)], steps=20)):
                    run.zero_grad()
                    model(x).sum().backward()
                    run.step()
                    if step == trial:
                        with run if end == "left" else contextlib.nullcontext():
                            raise Pruned
            del run
            gc.collect()
            own.progress.until(lambda: not own.progress.is_serving, "the end of the services")
            # The communication thread may hold it for another moment.
            own.progress.until(
                lambda freed=freed: gc.collect() >= 0 and freed() is None, "the end of the strategy"
            )
            assert len(set(own.gather(trial))) == 1


@pytest.mark.parametrize(
    "strategy",
    [ParameterServer, lambda: ParameterServer("async"), lambda: ParameterServer("elastic"), BackupWorkers],
    ids=["ps-sync", "ps-async", "ps-elastic", "backup"],
)
@pytest.mark.parametrize("per_node", ["0", "1"], ids=["one node", "nodes of one rank"])
def test_runs_that_are_dropped_after_their_loop_leave_nothing_in_a_world_of_the_user(
    world: Any, strategy: Any, per_node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCSGD_RANKS_PER_NODE", per_node)
    with World(timeout=30, device=str(torch.get_default_device())) as own:
        for _ in range(3):
            model = nn.Linear(3, 2)
            run = Run(model, torch.optim.SGD(model.parameters(), 0.1), strategy(), comm=own)
            for x in run.batches([torch.ones(2, 3)], steps=2):
                run.zero_grad()
                model(x).sum().backward()
                run.step()
            freed = weakref.ref(run.strategy)
            del run
            gc.collect()
            own.progress.until(lambda: not own.progress.is_serving, "the end of the services")
            own.progress.until(
                lambda freed=freed: gc.collect() >= 0 and freed() is None, "the end of the strategy"
            )


def test_a_rank_that_leaves_an_asynchronous_run_alone_in_a_world_of_the_user(world: Any) -> None:
    if world.size == 1:
        pytest.skip("needs two ranks")
    with World(timeout=30, device=str(torch.get_default_device())) as own:
        model = nn.Linear(3, 2)
        run = Run(
            model, torch.optim.SGD(model.parameters(), 0.1), LASGD(1, max_lag=1, trigger="all"), comm=own
        )
        with pytest.raises(RankLeft if world.rank else Pruned), run:
            for step, x in enumerate(run.batches([torch.ones(2, 3)], steps=20)):
                run.zero_grad()
                model(x).sum().backward()
                run.step()
                if world.rank == 0 and step == 2:
                    raise Pruned
        own.progress.until(lambda: not own.progress.is_serving, "the end of the services")


@pytest.mark.mpi(min_size=2)
def test_a_refused_run_and_one_that_an_exception_keeps_do_not_claim_the_model(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(30, 30)
    with pytest.raises(BadOption) as refused:
        start(model, AllReduce(), comm=world, virtual_nodes=2 * world.size)
    start(model, comm=world).close()
    assert refused.value.__traceback__ is not None

    def trial() -> None:
        run = start(model)
        train(run)
        raise Pruned("trial 3")

    with pytest.raises(Pruned) as kept:
        trial()
    monkeypatch.setattr("sys.last_value", kept.value, raising=False)  # as an interactive Python does
    with start(model, comm=world) as run:
        train(run)
