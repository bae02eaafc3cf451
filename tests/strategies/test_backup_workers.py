"""Backup workers in real time: recorded participants, and the models that follow from them."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import BackupWorkers, BadOption, DeadlineExceeded, HpcsgdError, Run, World, topology
from hpcsgd.errors import format_ranks
from hpcsgd.strategies import delays
from hpcsgd.strategies.backup_workers.agreement import CLOSE_OF_ITERATION, make_agreement
from hpcsgd.topology.graphs import is_connected
from tests.support.devices import on_device

FEATURES, LR, BATCHES = 4, 0.05, 7
LAYOUTS = pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
ONE_OF_EACH = pytest.mark.parametrize("layout", [(0, True), (2, True)], ids=str)
Sets = dict[int, list[int]]


def loader(peer: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(peer)
    xs = [on_device(torch.from_numpy(rng.standard_normal((6, FEATURES)))) for _ in range(BATCHES)]
    return [(x, x.sum(1, keepdim=True) + peer) for x in xs]


class Job:
    """A run of a regression, and the number of this rank's steps in each of its parts."""

    def __init__(self, world: Any, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(FEATURES, 1, dtype=torch.float64)
        self.start, self.loader, self.taken = self.vector(), loader(world.rank), list[int]()
        optimizer = torch.optim.SGD(self.model.parameters(), LR)
        self.strategy = BackupWorkers(**options)
        self.run = Run(self.model, optimizer, self.strategy, comm=world)

    def vector(self) -> np.ndarray:
        return np.concatenate(
            [p.detach().flatten().numpy(force=True) for p in self.model.parameters()]
        ).copy()

    def train(self, steps: int, pause: Callable[[int], object] = lambda number: None) -> None:
        self.taken.append(0)
        for x, y in self.run.batches(self.loader, steps=steps):
            pause(sum(self.taken))
            self.run.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.run.step()
            self.taken[-1] += 1

    def sets(self) -> Sets:
        """Return the participants of each iteration; check that all of them recorded the same."""
        found: Sets = {}
        everyone = self.run.world.gather(list(self.strategy.record))
        for rank, record in enumerate(everyone):
            for t, members in record:
                assert rank in members and found.setdefault(t, members) == members
        for t, members in found.items():
            assert all((t, members) in everyone[rank] for rank in members)
        assert sorted(found) == list(range(self.run.steps))
        return found

    def check_models(self, parts: list[int]) -> None:
        """Check all models against the recorded participants; `parts` are the iterations of each loop."""
        size, sets = self.run.world.size, self.sets()
        taken, models = zip(*self.run.world.gather((self.taken, self.vector())), strict=True)
        x, gradients = np.tile(self.start, (size, 1)), [self._gradients(peer) for peer in range(size)]
        for part, end in enumerate(accumulate(parts)):
            left = [counts[part] for counts in taken]
            for t in range(end - parts[part], end):
                for peer in sets[t]:
                    x[peer] -= LR * next(gradients[peer])(x[peer])
                    left[peer] -= 1
                mixing = topology.metropolis(size, links(size, sets[t]))
                np.testing.assert_allclose(mixing.sum(0), 1)
                x = mixing @ x
            assert set(left) <= {0, 1}
            for peer in np.flatnonzero(left):  # too late for the last iteration
                x[peer] -= LR * next(gradients[peer])(x[peer])
        np.testing.assert_allclose(np.stack(models), x, rtol=1e-10)

    @staticmethod
    def _gradients(peer: int) -> Any:
        batches = [(x.numpy(force=True), y.numpy(force=True)[:, 0]) for x, y in loader(peer)]
        while True:
            for x, y in batches:
                a = np.column_stack([x, np.ones(len(x))])
                yield lambda model, a=a, y=y: 2 / len(a) * a.T @ (a @ model - y)


def links(size: int, members: list[int]) -> list[tuple[int, int]]:
    return [link for link in topology.build("ring", size).edges() if {*link} <= {*members}]


def check_epochs(size: int, sets: Sets) -> None:
    """Check that each iteration uses an edge that is new in its epoch, and each epoch connects all ranks."""
    path = set(topology.build("ring", size).spanning())
    unused, joined = set(path), list[tuple[int, int]]()
    for t in sorted(sets):
        used = {edge for edge in unused if {*edge} <= {*sets[t]}}
        assert used or size == 1
        unused -= used
        joined += links(size, sets[t])
        if not unused:
            assert is_connected(size, joined)
            unused, joined = set(path), []


def sleeper(world: Any, spec: str) -> Callable[[int], None]:
    delay = delays.build(spec)
    return lambda number: time.sleep(min(0.03, delay.sample(world.rank, number)))


@pytest.mark.mpi
@LAYOUTS
@pytest.mark.parametrize("spec", ["exponential:mean=0.002", "pareto:shape=1+scale=0.0005"])
def test_models_follow_from_the_participants(
    world_of: Callable[..., Any], layout: tuple[int, bool], spec: str
) -> None:
    world = world_of(*layout)
    job = Job(world)
    with job.run:
        for steps in (1, 14, 9):
            job.train(steps, sleeper(world, spec))
            assert world.gather(job.run.steps) == [job.run.steps] * world.size
        job.check_models([1, 14, 9])
        check_epochs(world.size, job.sets())
        job.run.consensus_distance()


@pytest.mark.mpi
@ONE_OF_EACH
@pytest.mark.parametrize("backups", [0, 1])
def test_a_fixed_number_of_backups(
    world_of: Callable[..., Any], layout: tuple[int, bool], backups: int
) -> None:
    world = world_of(*layout)
    if world.size < backups + 2:
        pytest.skip("too few ranks")
    job = Job(world, backups=backups)
    with job.run:
        job.train(12, sleeper(world, "exponential:mean=0.002"))
        job.check_models([12])
        assert {len(members) for members in job.sets().values()} <= {world.size - backups, world.size}
        assert backups or job.taken == [12]


@pytest.mark.mpi(min_size=3)
@ONE_OF_EACH
def test_iterations_do_not_wait_for_a_slow_rank(
    world_of: Callable[..., Any], layout: tuple[int, bool]
) -> None:
    world = world_of(*layout)
    job = Job(world)
    with job.run:
        job.train(16, lambda number: time.sleep(0.03 if world.rank == world.size - 1 else 0.003))
        *_, slow = world.gather(job.taken[0])
        assert slow <= 12
        check_epochs(world.size, job.sets())


@pytest.mark.mpi(min_size=2)
@ONE_OF_EACH
def test_a_rank_that_is_stopped_for_a_while(world_of: Callable[..., Any], layout: tuple[int, bool]) -> None:
    world = world_of(*layout)
    job, victim = Job(world), world.size - 1
    pids, times = world.gather(os.getpid()), [time.monotonic()]
    signals = [signal.SIGSTOP, signal.SIGCONT] if world.rank == 0 else []
    draw = random.Random(world.rank)

    def stop(number: int) -> None:
        time.sleep(draw.random() * 0.004)
        times.append(time.monotonic())
        if signals and number == 10:
            os.kill(pids[victim], signals.pop(0))
            time.sleep(1.2)
            os.kill(pids[victim], signals.pop(0))

    with job.run:
        try:
            job.train(30, stop)
        finally:
            if world.rank == 0:
                os.kill(pids[victim], signal.SIGCONT)
        gap = max(b - a for a, b in pairwise(times))
        assert world.gather(gap)[victim] > 0.2
        job.check_models([30])


@pytest.mark.mpi(min_size=2)
def test_two_runs_in_one_world_do_not_mix_messages(world_of: Callable[..., Any]) -> None:
    world = world_of(0, False)
    first, second = Job(world), Job(world, backups=0)
    with first.run, second.run:
        for job in (first, second, first):
            job.train(6, sleeper(world, "exponential:mean=0.001"))
        first.check_models([6, 6])
        second.check_models([6])


@pytest.mark.mpi
@ONE_OF_EACH
def test_load_state_dict_restores_the_iteration(
    world_of: Callable[..., Any], layout: tuple[int, bool]
) -> None:
    world = world_of(*layout)
    job = Job(world)
    with job.run as run:
        job.train(7, sleeper(world, "exponential:mean=0.001"))
        state = run.state_dict()
        assert len({str(states) for states in world.gather(state["strategy"])}) == 1
        job.train(9, sleeper(world, "exponential:mean=0.001"))
        run.load_state_dict(state)
        assert run.state_dict()["strategy"] == state["strategy"] and run.steps == 7
        before = len(job.strategy.record)
        job.train(9)
        assert run.steps == 16
        again = list(job.strategy.record)[before:]
        assert all(7 <= t < 16 for t, _ in again)


@pytest.mark.mpi(min_size=2)
def test_a_step_outside_run_batches_is_an_error(world: Any) -> None:
    job = Job(world)
    with job.run as run, pytest.raises(HpcsgdError, match=r"run\.batches"):
        run.step()


@pytest.mark.mpi(min_size=2)
def test_an_iteration_needs_two(world: Any) -> None:
    with pytest.raises(BadOption, match=f"0 to {world.size - 2}"):
        Job(world, backups=world.size - 1)
    with pytest.raises(BadOption, match=f"some of the peers 0 to {world.size - 1}, got peer=99"):
        Job(world, delays="slow:peer=99")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shared", [True, False])
def test_a_wait_beyond_the_deadline_is_an_error(
    world: Any, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    monkeypatch.setenv("HPCSGD_SHARED_MEMORY", str(int(shared)))
    with World(timeout=30, device=str(torch.get_default_device())) as impatient:
        iterations = make_agreement(impatient, topology.build("ring", world.size).spanning(), 0)
        if world.rank == 0:
            impatient.waiter.timeout = 0.5
            missing = format_ranks(range(1, world.size))
            with pytest.raises(DeadlineExceeded, match=f"for {missing} in" if shared else "close of an"):
                impatient.waiter.complete(lambda: iterations.join(5), CLOSE_OF_ITERATION)
            impatient.waiter.timeout = 30
        world.gather(None)
        if world.rank:
            joined = impatient.waiter.complete(lambda: iterations.join(5), CLOSE_OF_ITERATION)
            assert joined == (0, list(range(world.size)))
        iterations.close()


@pytest.mark.mpi
def test_virtual_time_is_equal_on_all_ranks(world: Any) -> None:
    job = Job(world, delays="pareto:seed=3")
    with job.run:
        job.train(10)
        job.train(8)
        job.check_models([10, 8])
        check_epochs(world.size, job.sets())
        assert world.gather(job.strategy.virtual_seconds) == [job.strategy.virtual_seconds] * world.size
        assert job.strategy.virtual_seconds > 10
