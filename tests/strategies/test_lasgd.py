"""LASGD: the sum that its averages conserve, waits, and the start and end of rounds."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import FP16, LASGD, BadOption, ErrorFeedback, HpcsgdError, QSGDMaxNorm, Run
from hpcsgd.collectives import allreduce
from hpcsgd.strategies.lasgd.averaging import Averaging
from hpcsgd.strategies.lasgd.statistics import RoundTotals
from hpcsgd.training.drift import DriftCheck
from tests.support.async_runs import (
    Job,
    check_averages_within_a_loop,
    loader,
    slow_service,
    train_while_rank_0_is_stopped,
)

each_layout = pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)


def averaging(job: Job) -> Averaging:
    return job.run.strategy._averaging  # type: ignore[attr-defined,no-any-return]


def totals(job: Job) -> RoundTotals:
    return averaging(job).statistics.totals


def doze(seed: object) -> Callable[[], None]:
    """Return a function that sleeps up to 4 ms, at random for each rank."""
    rng = random.Random(str(seed))
    return lambda: time.sleep(rng.random() * 4e-3)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("layout", "trigger"),
    [((0, True), "any"), ((0, True), "all"), ((0, True), "free"), ((2, True), "any"), ((0, False), "any")],
    ids=str,
)
def test_only_gradient_steps_change_the_sum_of_the_models(
    world_of: Callable[..., Any], layout: tuple[int, bool], trigger: Any
) -> None:
    world = world_of(*layout)
    job = Job(world, LASGD(2, trigger=trigger))
    with slow_service(world, world.rank), job.run as run:
        for steps in (20, 1, 12):
            before = run.steps
            job.train(steps, doze((world.rank, steps)))
            assert world.gather(run.steps) == [before + steps] * world.size
            job.assert_conserved()
        assert sum(world.gather(job.taken)) >= 33 * world.size
        rounds = world.gather(totals(job).rounds)
        assert len(set(rounds)) == 1 and (rounds[0] > 0) == (world.size > 1)
        moved = np.abs(job.vector() - job.start - job.added).max()
        assert (max(world.gather(moved)) > 1e-9) == (world.size > 1)


@pytest.mark.mpi
def test_hardly_more_steps_are_taken_than_asked_for(world: Any) -> None:
    job = Job(world, LASGD(4))
    with job.run:
        for _ in range(4):
            job.train(10, lambda: time.sleep(5e-3))
        taken = sum(world.gather(job.taken))
        assert 40 * world.size <= taken <= (40 + 2 * 4) * world.size


@pytest.mark.mpi
@pytest.mark.parametrize("algorithm", ["library", "ring", "node", "two-level"])
def test_every_all_reduce_algorithm_averages(world_of: Callable[..., Any], algorithm: str) -> None:
    world = world_of(2 if algorithm == "two-level" else 0, True)
    job = Job(world, LASGD(1), algorithm=algorithm)
    with job.run as run:
        for _ in range(20):
            job.train(100)
            job.assert_conserved()
            if max(world.gather(np.abs(job.vector() - 1).max())) < 1e-4:
                break
        else:
            pytest.fail("no rank may be away from the solution")
        assert run.consensus_distance() < 1e-3


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        *(
            ((per_node, shared), ErrorFeedback(QSGDMaxNorm()))
            for per_node, shared in [(0, 1), (2, 1), (0, 0)]
        ),
        ((0, True), FP16()),
    ],
    ids=str,
)
def test_compressed_changes_conserve_the_sum(
    world_of: Callable[..., Any], layout: tuple[int, bool], scheme: Any
) -> None:
    world = world_of(*layout)
    job = Job(world, LASGD(2, merge="delta", compress=scheme))
    with job.run as run:
        job.train(12, doze(world.rank))
        if world.size > 1 and isinstance(scheme, ErrorFeedback):
            assert_residuals_hold_the_rest(job, by_node=layout == (2, True) and world.nodes > 1)
        for _ in range(15):
            job.train(20)
            if run.consensus_distance() < 2e-3 and max(world.gather(np.abs(job.vector() - 1).max())) < 1e-2:
                break
        else:
            pytest.fail("no rank may be away from the solution")


def assert_residuals_hold_the_rest(job: Job, by_node: bool) -> None:
    """The amount by which averages changed the sum of the models is that of the residuals, negated."""
    state = job.run.state_dict()["strategy"]["delta"]["reduction"]
    rests = [rest.double() for rest in state["residuals"] if rest is not None]
    total = sum(float(rest.sum()) for rest in rests)
    size = sum(float(rest.abs().sum()) for rest in rests)
    own = float((job.vector() - job.start - job.added).sum()), total, size
    moved, residual, magnitude = np.sum(job.run.world.gather(own), axis=0)
    # If nodes sum first, their residuals are those of shares of the mean.
    np.testing.assert_allclose(moved, -residual * (job.run.world.size if by_node else 1), atol=1e-5)
    assert magnitude > 1e-3  # residuals of both signs may cancel


@pytest.mark.mpi
def test_all_orders_of_finishing_end_with_equal_counts(world: Any) -> None:
    orders = list(itertools.islice(itertools.permutations(range(world.size)), 24))
    job = Job(world, LASGD(1))
    with job.run as run:
        for order in orders:
            before, late = run.steps, order.index(world.rank) * 4e-3
            job.train(2, lambda late=late: time.sleep(late))  # type: ignore[misc]
            # They request the mean one after the other too.
            time.sleep(late)
            with run.averaged():
                pass
            assert (
                world.gather((run.steps, totals(job).rounds, before + 2))
                == [(before + 2, totals(job).rounds, before + 2)] * world.size
            )
            job.assert_conserved()


@pytest.mark.mpi(min_size=2)
def test_a_slow_rank_slows_neither_steps_nor_rounds(world: Any) -> None:
    job = Job(world, LASGD(1))
    with job.run:
        started = time.perf_counter()
        job.train(60, lambda: time.sleep(0.2 if world.rank == 0 else 0.005))
        seconds = time.perf_counter() - started
        slow, *others = world.gather(job.taken)
        assert 1 <= slow < min(others) / 3
        # While the slow rank takes a step the others average several times.
        assert totals(job).rounds > 2 * slow
        assert slow <= seconds / 0.05 + 1
        job.assert_conserved()


@pytest.mark.mpi(min_size=2)
def test_steps_go_on_while_a_rank_is_stopped(world: Any) -> None:
    job = Job(world, LASGD(2))
    with job.run:
        assert min(train_while_rank_0_is_stopped(job, 350)[1:]) > 20
        job.assert_conserved()
        assert totals(job).waited == 0


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("trigger", ["any", "all", "free"])
def test_no_merge_is_older_than_max_lag(world: Any, trigger: Any) -> None:
    job = Job(world, LASGD(2, 3, trigger))
    with slow_service(world, world.rank), job.run:
        job.train(30, doze(world.rank))
        assert totals(job).longest_lag <= 3
        job.assert_conserved()
        assert sum(world.gather(totals(job).merges)) >= 9 * world.size


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("left", "own", "quiescing", "finished"),
    [
        (0, 0.02, False, True),
        (1, 0.02, False, False),
        (1, 0.08, False, True),
        (1, 0.08, True, False),
        (1000, 0.08, False, False),
    ],
)
def test_the_last_steps_are_left_to_faster_ranks(
    world: Any, left: int, own: float, quiescing: bool, finished: bool
) -> None:
    job = Job(world, LASGD())
    with job.run:
        rounds = averaging(job)
        rounds._records.step_seconds, rounds._records.quiescing = 0.02, quiescing
        rounds.statistics.step_seconds, job.run.strategy.target = own, rounds.total_steps(begun=True) + left
        assert rounds.is_finished() is finished


@pytest.mark.mpi
def test_averaged_within_a_loop_waits_for_rounds_in_flight(world: Any) -> None:
    job = Job(world, LASGD(1))
    with slow_service(world, world.rank), job.run:
        check_averages_within_a_loop(job, lambda _: time.sleep(2e-3 * (world.rank % 3)), atol=1e-12)


@pytest.mark.mpi(min_size=2)
def test_ranks_are_compared_while_no_round_can_begin(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, compared = DriftCheck.compare, []

    def while_quiescent(*arguments: Any, **options: Any) -> None:
        mine = averaging(job)
        compared.append(mine._control._requested or mine._in_flight)  # type: ignore[union-attr]
        compare(*arguments, **options)

    monkeypatch.setattr(DriftCheck, "compare", while_quiescent)
    job = Job(world, LASGD(1))
    for call in (job.run.check, job.run.averaged, job.run.close):
        job.train(2)
        job.step(*loader(world.rank)[0])  # after the loop, as one that looks a batch ahead
        with call() or contextlib.nullcontext():
            pass
    assert compared == [False] * 3


@pytest.mark.mpi
def test_closing_leaves_the_mean_on_all_ranks(world: Any) -> None:
    job = Job(world, LASGD(64))
    with job.run:
        job.train(7)
        mean = np.mean(world.gather(job.vector()), 0)
    np.testing.assert_allclose(job.vector(), mean, rtol=1e-12)
    assert len({vector.tobytes() for vector in world.gather(job.vector())}) == 1


@pytest.mark.mpi
@pytest.mark.parametrize("scheme", [None, ErrorFeedback(QSGDMaxNorm(bits=4))], ids=str)
def test_load_state_dict_restores_models_and_totals(world: Any, scheme: Any) -> None:
    first, second = (Job(world, LASGD(compress=scheme)) for _ in range(2))
    with first.run, second.run:
        first.train(12)
        state, vector = copy.deepcopy(first.run.state_dict()), first.vector()
        second.train(3)
        second.run.load_state_dict(state)
        np.testing.assert_array_equal(second.vector(), vector)
        assert second.run.state_dict()["strategy"].keys() == state["strategy"].keys()
        assert totals(second) == totals(first)
        second.start, second.added = vector, 0.0
        second.train(8)
        assert second.run.steps == 20
        if scheme is None:
            second.assert_conserved()


@pytest.mark.mpi
@each_layout
def test_bytes_are_one_all_reduce_a_round(world_of: Callable[..., Any], layout: tuple[int, bool]) -> None:
    world = world_of(*layout)
    job = Job(world, LASGD(2))
    with job.run as run:
        group = run.strategy.parameters.group
        job.train(1)
        before, rounds = world.traffic.sent, totals(job).rounds
        job.train(20, doze(world.rank))
        rounds = totals(job).rounds - rounds
        assert (rounds > 0) == (world.size > 1)
        sent, start = world.traffic.sent - before, world.traffic.sent
        allreduce(group)
        assert sent == rounds * (world.traffic.sent - start)


@pytest.mark.mpi
def test_metrics_are_those_of_the_rounds(world: Any) -> None:
    job = Job(world, LASGD(2, 2, "all"))
    with job.run as run:
        snapshots = []
        for x, y in run.batches(loader(world.rank), steps=8):
            own, added = job.vector(), job.added
            job.step(x, y)
            if job.taken % 2 == 0:
                # The merge was in this step.
                snapshots.append(own + job.added - added)
        every = world.gather(snapshots)
        distances = [
            np.linalg.norm(own - np.mean(own, 0)) / world.size**0.5 for own in zip(*every, strict=True)
        ]
        if world.size > 1:
            metrics = run.strategy.metrics()
            # The consensus distances of the snapshots.
            np.testing.assert_allclose(metrics.pop("drift"), np.mean(distances), rtol=1e-6)
            assert np.mean(distances) > 0 and 0 <= metrics.pop("hidden") < 1
            expected = {"period": 2, "rounds": 4, "steps_per_round": 2, "lag": 0, "longest_lag": 0}
            assert metrics == expected
            assert run.strategy.metrics()["rounds"] == 0, "since the last call"


def test_a_lag_below_the_period_is_rejected() -> None:
    with pytest.raises(BadOption, match="max_lag of at least 4"):
        LASGD(period=4, max_lag=3)


@pytest.mark.mpi(min_size=2)
def test_unsupported_features_are_rejected(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="no virtual nodes"):
        Job(world, LASGD(), virtual_nodes=2 * world.size)
    monkeypatch.setattr(world.progress, "threaded", False)
    with pytest.raises(HpcsgdError, match="MPI_THREAD_MULTIPLE"):
        Job(world, LASGD())


@pytest.mark.mpi
def test_a_state_taken_outside_of_a_loop_can_be_loaded(world: Any) -> None:
    """Ranks are at different steps until they rest."""
    states = []
    for number in range(2):
        model = nn.Linear(2, 1)
        with Run(model, torch.optim.SGD(model.parameters(), 0.1), LASGD(period=2), comm=world) as run:
            if number:
                run.load_state_dict(states[0])
                assert run.steps == 6 + (world.size - 1) // 2
            for _ in range(6 + world.rank):
                run.zero_grad()
                model(torch.ones(1, 2)).sum().backward()
                run.step()
            states.append(run.state_dict())
    assert states[0]["steps"] == sum(6 + rank for rank in range(world.size)) // world.size


@pytest.mark.mpi
@pytest.mark.filterwarnings("error:a step has taken")
def test_a_loop_that_looks_ahead_is_none_that_accumulates(world: Any) -> None:
    model = nn.Linear(2, 1)
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), LASGD(period=2), comm=world) as run:
        loop = iter(run.batches([torch.ones(1, 2) * n for n in range(9)]))
        x = next(loop)
        while x is not None:
            following = next(loop, None)
            run.zero_grad()
            model(x).sum().backward()
            run.step()
            x = following


@pytest.mark.mpi(min_size=2)
def test_an_optimizer_replaces_parameters_while_rounds_are_in_flight(world: Any) -> None:
    class Replacing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.data = p.data - p.grad

    model = nn.Linear(500, 10, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    with Run(model, Replacing(model.parameters(), 1.0), LASGD(1), comm=world) as run:
        rounds = 0
        while (rounds := rounds + run.strategy.metrics()["rounds"]) < 5:
            model.weight.grad = torch.ones_like(model.weight)
            time.sleep(1e-3)
            run.step()
        steps = sum(run.state_dict()["strategy"]["steps"])
    np.testing.assert_allclose(model.weight.numpy(force=True), -steps / world.size)
