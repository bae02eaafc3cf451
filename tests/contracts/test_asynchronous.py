"""The contract of asynchronous strategies; one of them is written here, in fewer than 40 lines."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import ADPSGD, LASGD, Run, Strategy
from hpcsgd.strategies.adpsgd.async_pairs import PairwiseAverager
from hpcsgd.strategies.asynchronous import AsynchronousStrategy
from hpcsgd.strategies.context import StrategyContext
from tests.support.async_runs import FEATURES, Job, loader


class Halves(AsynchronousStrategy):
    """Ranks of even numbers average with random ones of odd numbers, whenever they have taken a step."""

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        world, half = context.world, context.world.rank % 2
        others = range(1 - half, world.size, 2)
        self._pairs = PairwiseAverager(
            world, self.parameters.group, others, active=half == 0, seed=context.seed
        )

    def take_step(self, update: Callable[[], None]) -> None:
        self._pairs.step(update)

    def total_steps(self) -> int:
        return self._pairs.total_steps()

    def finish(self) -> None:
        self._pairs.finish()

    def settle(self) -> None:
        self._pairs.quiesce()

    def detach(self) -> None:
        self._pairs.close()
        super().detach()

    def disconnect(self) -> None:
        super().disconnect()
        self._pairs.abandon()

    def state_dict(self) -> dict[str, Any]:
        return self._pairs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pairs.load_state_dict(state)


METHODS = {"lasgd": LASGD, "adpsgd": lambda: ADPSGD("star"), "own": Halves}
each_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
Make = Callable[[], Strategy]


def test_a_method_without_its_parts_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="settle"):
        type("Unfinished", (Halves,), {"settle": AsynchronousStrategy.settle})()


@each_method
def test_one_rank_is_plain_training(alone: Any, make: Make) -> None:
    job = Job(alone, make())
    plain = nn.Linear(FEATURES, 1, dtype=torch.float64)
    plain.load_state_dict(job.model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    with job.run:
        job.train(7)
    for x, y in loader(0)[:7]:
        optimizer.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        optimizer.step()
    assert job.run.steps == 7 and all(map(torch.equal, plain.parameters(), job.model.parameters()))


@pytest.mark.mpi
@each_method
def test_a_loop_ends_at_its_step_on_all_ranks_and_conserves_the_sum(world: Any, make: Make) -> None:
    job = Job(world, make())
    with job.run:
        for number, steps in enumerate((12, 5), 1):
            job.train(steps, lambda: time.sleep(2e-3 * (world.rank % 3)))
            assert job.run.steps == (12, 17)[number - 1]
            assert sum(world.gather(job.taken)) >= job.run.steps * world.size
            job.assert_conserved()
    models = world.gather(job.vector())
    assert all(np.array_equal(models[0], each) for each in models)


@pytest.mark.mpi
@each_method
def test_steps_outside_of_a_loop_are_counted_when_the_ranks_meet(world: Any, make: Make) -> None:
    job = Job(world, make())
    with job.run:
        for x, y in loader(world.rank)[: 3 + world.rank % 2]:
            job.step(x, y)
        with job.run.averaged():
            pass
        assert job.run.steps == sum(world.gather(job.taken)) // world.size
        job.assert_conserved()


@pytest.mark.mpi
@each_method
def test_a_run_goes_on_from_its_state(world: Any, make: Make) -> None:
    first, second = Job(world, make()), Job(world, make())
    with first.run:
        first.train(6)
        state, taken = copy.deepcopy(first.run.state_dict()), first.taken
    with second.run:
        second.run.load_state_dict(state)
        assert second.run.steps == 6
        before = second.vector()
        second.train(4)
        assert second.run.steps == 10 and sum(world.gather(taken + second.taken)) >= 10 * world.size
        everyone = world.gather((second.vector(), before + second.added))
        now, expected = (sum(column) for column in zip(*everyone, strict=True))
        np.testing.assert_allclose(now, expected, rtol=1e-12)


@pytest.mark.mpi
@each_method
def test_a_run_that_is_left_by_an_error_ends(world: Any, make: Make) -> None:
    job = Job(world, make())

    def fail(run: Run) -> None:
        with run:
            job.train(3)
            raise ValueError

    with pytest.raises(ValueError):
        fail(job.run)
