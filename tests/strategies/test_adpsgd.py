"""AD-PSGD with schedule=free: conserved sum, waits, end of steps."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import ADPSGD, BadOption, HpcsgdError, topology
from hpcsgd.strategies.adpsgd.async_pairs import PairwiseAverager
from hpcsgd.strategies.adpsgd.pairing import BipartitePairs
from tests.support.async_runs import (
    FEATURES,
    Job,
    check_averages_within_a_loop,
    loader,
    slow_service,
    train_while_rank_0_is_stopped,
)


def job_of(world: Any, **options: Any) -> Job:
    return Job(world, ADPSGD("star"), **options)


@pytest.mark.mpi
@pytest.mark.parametrize("seed", range(3))
def test_only_gradient_steps_change_the_sum_of_the_models(world: Any, seed: int) -> None:
    rng = random.Random(f"{seed} {world.rank}")
    job = job_of(world, seed=seed)
    with slow_service(world, rng.randrange(100)), job.run as run:
        for steps in (20, 1, 15):
            before = run.steps
            job.train(steps, lambda: time.sleep(rng.random() * 2e-3))
            assert world.gather(run.steps) == [before + steps] * world.size
            job.assert_conserved()
        assert sum(world.gather(job.taken)) >= 36 * world.size
        moved = np.abs(job.vector() - job.start - job.added).max()
        assert (max(world.gather(moved)) > 1e-9) == (world.size > 1)


@pytest.mark.mpi
def test_all_come_to_the_solution(world: Any) -> None:
    job = job_of(world)
    with job.run as run:
        for _ in range(20):  # on a busy machine a rank takes but few of the steps
            job.train(100)
            if max(world.gather(np.abs(job.vector() - 1).max())) < 1e-4:
                break
        else:
            pytest.fail("no rank may be away from the solution")
        assert run.consensus_distance() < 1e-3


@pytest.mark.mpi(min_size=2)
def test_a_slow_rank_slows_no_other(world: Any) -> None:
    job = job_of(world)
    with job.run:
        job.train(40, lambda: time.sleep(0.1 if world.rank == 0 else 0.002))
        slow, *others = world.gather(job.taken)
        assert 1 <= slow < min(others) / 3
        job.assert_conserved()


@pytest.mark.mpi(min_size=2)
def test_steps_go_on_while_a_rank_is_stopped(world: Any) -> None:
    job = job_of(world)
    with job.run:
        assert min(train_while_rank_0_is_stopped(job, 350)[1:]) > 20
        job.assert_conserved()


@pytest.mark.mpi
def test_averaged_within_a_loop_waits_for_averages_in_flight(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_snapshot = PairwiseAverager._take_snapshot
    # Requests are sent long after they are due.
    monkeypatch.setattr(
        PairwiseAverager, "_take_snapshot", lambda self: (time.sleep(0.01), take_snapshot(self))
    )
    job = job_of(world)
    with job.run:
        # A new request starts with the step.
        check_averages_within_a_loop(job, lambda number: time.sleep(0.05 * (number % 4 == 3)))


@pytest.mark.mpi
def test_load_state_dict_restores_the_model(world: Any) -> None:
    first, second = job_of(world), job_of(world)
    with first.run, second.run:
        first.train(12)
        state, vector = copy.deepcopy(first.run.state_dict()), first.vector()
        second.train(3)
        second.run.load_state_dict(state)
        np.testing.assert_array_equal(second.vector(), vector)
        second.start, second.added = vector, 0.0
        second.train(8)
        assert second.run.steps == 20
        second.assert_conserved()


@pytest.mark.mpi
@pytest.mark.parametrize("layout", [(0, True), (1, True), (0, False)], ids=str)
def test_bytes_are_two_models_and_headers_a_pair(
    world_of: Callable[..., Any], layout: tuple[int, bool]
) -> None:
    world = world_of(*layout)
    job, before = job_of(world), world.traffic.sent
    with job.run as run:
        job.train(20)
        header = 8 * (world.size + 1)
        model = run.strategy.parameters.group.nbytes
        sent = sum(world.gather(world.traffic.sent - before)) - 2 * (world.size - 1) * header
        pairs, rest = divmod(sent, 2 * (model + header))
        assert rest == 0 and (pairs > 0) == (world.size > 1)
        active = len(BipartitePairs(topology.build("star", world.size)).active)
        assert pairs <= max(world.gather(job.taken)) * active


def test_one_rank_is_plain_training(alone: Any) -> None:
    plain, job = nn.Linear(FEATURES, 1, dtype=torch.float64), job_of(alone)
    plain.load_state_dict(job.model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    with job.run as run:
        job.train(10)
        for x, y in loader(0):
            optimizer.zero_grad()
            nn.functional.mse_loss(plain(x), y).backward()
            optimizer.step()
        assert run.steps == 10 and torch.equal(plain.weight, job.model.weight)


@pytest.mark.parametrize(
    ("name", "size"), [("ring", 2), ("ring", 6), ("star", 5), ("hypercube", 8), ("ring", 1)]
)
def test_every_pair_has_one_active_peer(name: str, size: int) -> None:
    graph = topology.build(name, size)
    pairs = BipartitePairs(graph)
    assert all((a in pairs.active) != (b in pairs.active) for a, b in graph.edges())
    for step in range(5):
        found = pairs.sample(3, step)
        assert sorted(active for active, _ in found) == (pairs.active if size > 1 else [])
        assert all(passive in pairs.neighbours[active] for active, passive in found)
    assert size < 6 or len({tuple(pairs.sample(3, step)) for step in range(9)}) > 1


@pytest.mark.parametrize(("name", "size"), [("ring", 5), ("complete", 3), ("one-peer-exponential", 4)])
def test_a_graph_that_is_not_bipartite_is_rejected(name: str, size: int) -> None:
    with pytest.raises(BadOption, match="bipartite"):
        BipartitePairs(topology.build(name, size))


@pytest.mark.mpi
def test_unsupported_features_are_rejected(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="schedule=drawn"):
        job_of(world, virtual_nodes=2 * world.size)
    if world.size > 1:
        monkeypatch.setattr(world.progress, "threaded", False)
        with pytest.raises(HpcsgdError, match="MPI_THREAD_MULTIPLE"):
            job_of(world)
