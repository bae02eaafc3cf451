"""Runs of asynchronous strategies: checks of the conserved sum, and delays of messages."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcsgd import Run, Strategy
from hpcsgd.mpi.tasks import POLL_INTERVAL, Steps
from tests.support.devices import on_device

FEATURES = 4


def loader(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of a regression without noise; all ranks have the same solution."""
    rng = np.random.default_rng(rank)
    xs = [on_device(torch.from_numpy(rng.standard_normal((8, FEATURES)))) for _ in range(10)]
    return [(x, x.sum(1, keepdim=True) + 1) for x in xs]


class Job:
    """A run, and the sum of all changes of this rank's model by its optimizer."""

    def __init__(self, world: Any, strategy: Strategy, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(FEATURES, 1, dtype=torch.float64)
        optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.run = Run(self.model, optimizer, strategy, comm=world, **options)
        self.start, self.added, self.taken = self.vector(), 0.0, 0
        optimizer.register_step_pre_hook(lambda *_: self._add(-1))
        optimizer.register_step_post_hook(lambda *_: self._add(1))

    def vector(self) -> np.ndarray:
        return np.concatenate(
            [p.detach().flatten().numpy(force=True) for p in self.model.parameters()]
        ).copy()

    def _add(self, sign: int) -> None:
        self.added = self.added + sign * self.vector()

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.run.zero_grad()
        nn.functional.mse_loss(self.model(x), y).backward()
        self.run.step()
        self.taken += 1

    def train(self, steps: int, pause: Callable[[], object] = lambda: None) -> None:
        for x, y in self.run.batches(loader(self.run.world.rank), steps=steps):
            pause()
            self.step(x, y)

    def assert_conserved(self) -> None:
        """Check that the sum of all models is its initial value plus the changes by the optimizers."""
        everyone = self.run.world.gather((self.vector(), self.start + self.added))
        now, expected = (sum(column) for column in zip(*everyone, strict=True))
        np.testing.assert_allclose(now, expected, rtol=1e-12)


def check_averages_within_a_loop(job: Job, pause: Callable[[int], object], atol: float = 0.0) -> None:
    """Check distance and mean at every fourth step: both must include all averages in flight."""
    world, run = job.run.world, job.run
    for number, (x, y) in enumerate(loader(world.rank)):
        pause(number)
        job.step(x, y)
        if number % 4 == 3:
            distance = run.consensus_distance()
            own = world.gather(job.vector())
            expected = np.linalg.norm(own - np.mean(own, 0)) / world.size**0.5
            np.testing.assert_allclose(distance, expected, atol=atol)
            job.assert_conserved()
            with run.averaged():
                np.testing.assert_allclose(job.vector(), np.mean(own, 0), rtol=1e-12)


@contextmanager
def slow_service(world: Any, seed: int) -> Iterator[None]:
    """Delay the communication thread's services at random."""
    rng = random.Random(seed)

    def delay() -> Steps[None]:
        while True:
            time.sleep(rng.random() * 2e-3)
            yield POLL_INTERVAL

    service = world.progress.serve(delay())
    try:
        yield
    finally:
        world.progress.stop_serving(service)


def train_while_rank_0_is_stopped(job: Job, steps: int) -> list[int]:
    """Train while rank 0 is stopped; return the steps of each rank in that time.

    That is half a second, and longer where rank 1 has not taken 40 steps in it.
    """
    world = job.run.world
    pids, times = world.gather(os.getpid()), [time.monotonic()]
    stopped_at = 0  # of the times

    def stop_rank_0_for_a_while() -> None:
        nonlocal stopped_at
        time.sleep(0.002)
        times.append(time.monotonic())
        if world.rank != 1:
            return
        if not stopped_at and times[-1] - times[0] > 0.05:
            stopped_at = len(times) - 1
            os.kill(pids[0], signal.SIGSTOP)
        elif len(times) > stopped_at + 40 and times[-1] - times[stopped_at] > 0.5:
            os.kill(pids[0], signal.SIGCONT)

    try:
        job.train(steps, stop_rank_0_for_a_while)
    finally:
        if world.rank == 1:
            os.kill(pids[0], signal.SIGCONT)
    gaps = [(b - a, a, b) for a, b in pairwise(times)]
    length, begin, end = world.gather(max(gaps, default=(0.0, 0.0, 0.0)))[0]
    assert length > 0.4
    return world.gather(sum(begin < moment < end for moment in times))
