"""Parameter servers and groups in one job: against AR-SGD, serial SGD and EASGD in NumPy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import AllReduce, BadOption, HpcsgdError, ParameterServer, Run
from hpcsgd.strategies.parameter_server.server_rank import ServerRole
from hpcsgd.strategies.parameter_server.worker import Worker
from tests.support.async_runs import FEATURES, Job, loader, train_while_rank_0_is_stopped
from tests.support.devices import assert_bits

STEPS = 7
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
    # Two rates in one bucket.
    "groups": lambda p: torch.optim.SGD(
        [{"params": [p[0], p[2]], "lr": 0.2}, {"params": [p[1], p[3]], "weight_decay": 0.1}], 0.05, fused=True
    ),
}


def layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 1)).double()


def trained(world: Any, strategy: Any, make: Any, bucket_mib: float = 1e-4, clip: bool = False) -> np.ndarray:
    """Model after two epochs with a learning-rate schedule."""
    model = layers()
    optimizer = make(list(model.parameters()))
    with Run(model, optimizer, strategy, comm=world, bucket_mib=bucket_mib) as run:
        batches = loader(run.worker)[:STEPS]
        for _ in range(2):
            for x, y in run.batches(batches):
                run.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                if clip:
                    run.synchronize()
                    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                run.step()
            for group in optimizer.param_groups:
                group["lr"] *= 0.7
        assert run.steps == 2 * STEPS
    return np.concatenate([p.detach().flatten().numpy(force=True) for p in model.parameters()])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("servers", [1, 2])
def test_sync_is_allreduce_over_all_workers_bit_for_bit(world: Any, name: str, servers: int) -> None:
    servers = min(servers, world.size - 1)
    served = trained(world, ParameterServer(servers=servers), OPTIMIZERS[name])
    workers = world.size - servers
    part = world.split(int(world.rank >= workers))
    reduced = trained(part, AllReduce(), OPTIMIZERS[name])
    part.close()
    expected = world.gather(reduced)[0]
    # The node's all-reduce adds in the order of ranks too; the order of two numbers does not matter.
    if workers <= 2 or world.nodes == 1:
        assert_bits(served, expected)
    else:
        np.testing.assert_allclose(served, expected, rtol=1e-12)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("layout", [(0, True), (2, True), (0, False)], ids=str)
def test_groups_equal_allreduce_to_rounding(world_of: Callable[..., Any], layout: tuple[int, bool]) -> None:
    """With groups of unequal size, and several gateways on a node, each for some of the buckets."""
    world = world_of(*layout)
    groups = max(1, (world.size - 1) // 2)
    served = trained(world, ParameterServer(groups=groups), OPTIMIZERS["momentum"])
    part = world.split(int(world.rank == world.size - 1))
    expected = world.gather(trained(part, AllReduce(), OPTIMIZERS["momentum"]))[0]
    part.close()
    np.testing.assert_allclose(served, expected, rtol=1e-11)


@pytest.mark.mpi(min_size=2)
def test_the_mean_gradient_of_a_group_can_be_clipped(world: Any) -> None:
    served = trained(world, ParameterServer(groups=1), OPTIMIZERS["momentum"], clip=True)
    part = world.split(int(world.rank == world.size - 1))
    expected = world.gather(trained(part, AllReduce(), OPTIMIZERS["momentum"], clip=True))[0]
    part.close()
    np.testing.assert_allclose(served, expected, rtol=1e-12)


@pytest.mark.mpi(min_size=2)
def test_async_with_one_group_is_serial_sgd(world: Any) -> None:
    """One worker; all other ranks are servers."""
    servers = world.size - 1
    for bound in (None, 0, 2):
        strategy = ParameterServer("async", servers, max_staleness=bound)
        served = trained(world, strategy, OPTIMIZERS["momentum"])
        model = layers()
        optimizer = OPTIMIZERS["momentum"](list(model.parameters()))
        for epoch in range(2):
            for x, y in loader(0)[:STEPS]:
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1 * 0.7 ** (epoch + 1)
        serial = np.concatenate([p.detach().flatten().numpy(force=True) for p in model.parameters()])
        assert_bits(served, serial)


class Easgd:
    """Synchronous EASGD on linear regressions, from its definition."""

    def __init__(self, workers: int, alpha: float, interval: int, start: np.ndarray) -> None:
        self.x, self.c = np.tile(start, (workers, 1)), start.copy()
        self.alpha, self.interval = alpha, interval

    def run(self, steps: int) -> None:
        for t in range(steps):
            for worker, model in enumerate(self.x):
                x, y = (tensor.numpy(force=True) for tensor in loader(worker)[t % 10])
                residual = x @ model[:-1, None] + model[-1] - y
                model -= 0.1 * 2 / len(x) * np.append(x.T @ residual, residual.sum())
            if (t + 1) % self.interval == 0:
                pulls = self.alpha * (self.x - self.c)
                self.c = self.c + pulls.sum(axis=0)
                self.x = self.x - pulls


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("alpha", [None, 0.2])
@pytest.mark.parametrize("servers", [1, 2])
def test_elastic_together_obeys_its_recursion(world: Any, alpha: float | None, servers: int) -> None:
    servers = min(servers, world.size - 1)
    workers = world.size - servers
    job = Job(world, ParameterServer("elastic", servers, interval=3, alpha=alpha, max_staleness=0))
    with job.run:
        reference = Easgd(workers, alpha or 0.9 / workers, 3, job.start)
        for steps in (9, 3):
            job.train(steps)
            reference.run(steps)
            if world.rank < workers:
                assert job.taken == job.run.steps
        if world.rank < workers:
            np.testing.assert_allclose(job.vector(), reference.x[world.rank], rtol=1e-11)
        distance = np.sqrt(((reference.x - reference.c) ** 2).sum(axis=1).mean())
        np.testing.assert_allclose(job.run.consensus_distance(), distance, rtol=1e-9)
        with job.run.averaged():
            np.testing.assert_allclose(job.vector(), reference.c, rtol=1e-11)
    np.testing.assert_allclose(job.vector(), reference.c, rtol=1e-11)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("mode", ["async", "elastic"])
@pytest.mark.parametrize("bound", [None, 1])
def test_groups_share_the_steps_at_any_speed(
    world: Any, mode: Any, bound: int | None, groups: int | None
) -> None:
    """All groups together take exactly the requested steps, and the ranks of a group equally many."""
    workers = world.size - 1
    groups = workers if groups is None else min(groups, workers)
    job = Job(world, ParameterServer(mode, groups=groups, interval=2, max_staleness=bound))
    doze = random.Random(str(world.rank))
    with job.run:
        for steps in (5, 8):
            before = job.taken
            job.train(steps, lambda: time.sleep(doze.random() * 4e-3 * (1 + 3 * (world.rank == 0))))
            taken = world.gather(job.taken - before)
            assert taken[workers] == 0
            by_group: dict[int, set[int]] = {}
            for rank in range(workers):
                by_group.setdefault(rank * groups // workers, set()).add(taken[rank])
            assert all(len(counts) == 1 for counts in by_group.values()), taken
            assert sum(counts.pop() for counts in by_group.values()) == steps * groups
        with job.run.averaged():
            loss = sum(float(nn.functional.mse_loss(job.model(x), y)) for x, y in loader(0)) / 10
        first = sum(float((y**2).mean()) for _, y in loader(0)) / 10
        assert loss < first


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("mode", ["sync", "async", "elastic"])
def test_steps_continue_while_a_rank_is_stopped(world: Any, mode: Any) -> None:
    job = Job(world, ParameterServer(mode, interval=2, lease=0.1))
    with job.run:
        steps = train_while_rank_0_is_stopped(job, 250)[1:-1]
        assert min(steps) > 20
        job.train(2)  # it is awaited again
        assert world.gather(job.taken)[0] > 2


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("mode", ["async", "elastic"])
def test_resumed_run_has_the_same_bits(world: Any, mode: Any) -> None:
    """With one group the order of updates is fixed."""

    def begin() -> Job:
        return Job(world, ParameterServer(mode, groups=1, interval=4))

    straight = begin()
    with straight.run:
        straight.train(6)
        straight.train(5)
    first = begin()
    with first.run:
        first.train(6)
        state = first.run.state_dict()
        state = {**state, "model": {k: v.clone() for k, v in state["model"].items()}}
        first.train(3)
    second = begin()
    with second.run:
        second.run.load_state_dict(state)
        second.train(5)
        assert second.run.steps == 11
    np.testing.assert_array_equal(second.vector(), straight.vector())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("groups", [None, 1])
def test_bytes_are_those_of_pushes_and_pulls(world: Any, groups: int | None) -> None:
    """One push and one reply for each group and exchange."""
    workers = world.size - 1
    job = Job(world, ParameterServer("elastic", groups=groups, interval=2, max_staleness=0))
    with job.run:
        before = world.traffic.sent
        job.train(8)
        world.progress.drain()
        sent = world.gather(world.traffic.sent - before)
        nbytes = world.gather(_bytes_of(job))[0]
        exchanges = (workers if groups is None else 1) * 4
        assert sent[workers] == exchanges * nbytes
        if groups is None:
            assert sum(sent[:workers]) == exchanges * nbytes


def _bytes_of(job: Job) -> int:
    role = job.run.strategy._role  # type: ignore[attr-defined]
    if isinstance(role, ServerRole):
        return sum(shard.nbytes for shard in role.server.shards.values())
    assert isinstance(role, Worker)
    return role.parameters.group.nbytes


@pytest.mark.mpi(min_size=2)
def test_too_few_ranks_are_refused(world: Any) -> None:
    for strategy in (ParameterServer(servers=world.size), ParameterServer(groups=world.size)):
        with pytest.raises(BadOption, match="too few ranks for servers and groups"):
            Job(world, strategy)


@pytest.mark.mpi(min_size=2)
def test_optimizer_that_is_not_elementwise_is_refused(world: Any) -> None:
    model = layers().float()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(HpcsgdError, match="cannot take steps of LBFGS"):
        Run(model, optimizer, ParameterServer(), comm=world)


def test_a_mode_without_a_server_is_refused() -> None:
    with pytest.raises(BadOption, match="mode async needs a server"):
        ParameterServer("async", servers=0)


@pytest.mark.mpi(min_size=3)
def test_metrics_report_the_staleness_of_pushes(world: Any) -> None:
    workers = world.size - 1
    job = Job(world, ParameterServer("async", max_staleness=1))
    with job.run:
        job.train(10)
        metrics = world.gather(job.run.strategy.metrics())
        server = metrics[workers]
        assert sum(server["staleness_histogram"]) == 10 * workers
        # Between a worker's pull and push there are at most 2 s + 1 pushes of each other worker.
        assert 0 < server["staleness"] <= server["longest_staleness"] <= 3 * (workers - 1)
        assert 0 < server["load"] <= 1 and server["queue"] >= 1
        assert all(set(record) == set(server) for record in metrics)
        assert sum(world.gather(job.run.strategy.metrics())[workers]["staleness_histogram"]) == 0
