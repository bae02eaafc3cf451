"""Parameter servers with compressed pushes and replies: bytes, bits, conserved sums, and convergence."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hpcsgd import AllReduce, BadOption, HpcsgdError, ParameterServer, Run
from hpcsgd.compress import build
from hpcsgd.compress.base import Compressor, Segment
from hpcsgd.compress.point_to_point import FACTOR_BYTES, PointToPointCodec
from hpcsgd.server.code_sum import CodeSumServer
from hpcsgd.strategies.parameter_server.server_rank import ServerRole
from hpcsgd.tensors.group import TensorGroup
from tests.support.devices import on_device

pytestmark = pytest.mark.mpi(min_size=2)
SPECS = ["ef+hadamard+maxnorm:bits=3,block=64", "ef+randk:ratio=0.3"]
FEATURES, HIDDEN, BATCH = 20, 30, 16


def data(worker: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = np.random.default_rng((worker, step)).standard_normal((BATCH, FEATURES))
    x = on_device(torch.from_numpy(numbers).float())
    return x, (x[:, :3].sum(1, keepdim=True) * 0.3).tanh()


class Job:
    """Run of a small network with momentum, in three buckets."""

    def __init__(self, world: Any, strategy: Any, spec: str, lr: float = 0.05, **options: Any) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))
        optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.5)
        options = {"bucket_mib": 2e-3, "compress": build(spec), **options}
        self.world, self.run = world, Run(self.model, optimizer, strategy, comm=world, **options)
        self.taken = 0

    def vector(self) -> np.ndarray:
        return np.concatenate(
            [p.detach().flatten().numpy(force=True) for p in self.model.parameters()]
        ).copy()

    def train(self, steps: int, worker: int | None = None) -> None:
        worker = self.world.rank if worker is None else worker
        for x, y in self.run.batches([data(worker, self.taken + i) for i in range(steps)], steps=steps):
            self.run.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            self.run.step()
            self.taken += 1

    def loss(self) -> float:
        batches = [data(97, i) for i in range(8)]
        with torch.no_grad():
            return float(np.mean([float(nn.functional.mse_loss(self.model(x), y)) for x, y in batches]))


def shards(job: Job) -> dict[int, Any]:
    role = job.run.strategy._role  # type: ignore[attr-defined]
    return role.server.shards if isinstance(role, ServerRole) else {}


def code_bytes(job: Job, spec: str, models: bool) -> tuple[int, int, int]:
    """Total bytes of all shards: codes of a push, codes of a reply, and values."""
    compressor, pushed, answered, dense = build(spec), 0, 0, 0
    assert isinstance(compressor, Compressor)
    buckets = list(_gradients(job))
    total = sum(bucket.numel for bucket in buckets)
    for bucket in buckets:
        coder = PointToPointCodec(
            compressor, Segment(bucket.numel, 1, share=bucket.numel / total), torch.float32
        )
        if coder.nbytes + FACTOR_BYTES < bucket.nbytes:
            pushed += coder.nbytes + FACTOR_BYTES * models
            answered += coder.nbytes + FACTOR_BYTES
        else:
            pushed, answered = pushed + bucket.nbytes, answered + bucket.nbytes
        dense += bucket.nbytes
    return pushed, answered, dense


def _gradients(job: Job) -> TensorGroup:
    """Tensor group with the layout of the gradients."""
    named = [(name, p) for name, p in reversed(list(job.model.named_parameters()))]
    return TensorGroup(job.world, named, 2e-3)


@pytest.mark.parametrize("mode", ["async", "elastic"])
@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_the_codes(world: Any, mode: Any, spec: str) -> None:
    """The first push of a model and the first reply with values are dense: there is no reference yet."""
    job = Job(world, ParameterServer(mode, groups=1, interval=1), spec)
    with job.run:
        steps, models = 6, mode == "elastic"
        pushed, answered, dense = code_bytes(job, spec, models)
        traffic = world.traffic
        world.progress.drain()
        before = traffic.sent, traffic.saved
        job.train(steps)
        world.progress.drain()
        sent, saved = world.gather((traffic.sent - before[0], traffic.saved - before[1]))[world.size - 1]
        answers = answered * steps if models else dense + answered * (steps - 1)
        assert (sent, saved) == (answers, dense * steps - answers)
        if world.size == 2:  # a group of one has no other traffic
            sent, saved = world.gather((traffic.sent - before[0], traffic.saved - before[1]))[0]
            pushes = dense + pushed * (steps - 1) if models else pushed * steps
            assert (sent, saved) == (pushes, dense * steps - pushes)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_those_of_the_parts_of_a_sum(world: Any, spec: str) -> None:
    """Parts of each worker, combinations that it receives, and the reply with the values."""
    job = Job(world, ParameterServer(), spec)
    with job.run:
        job.train(1)  # the workers have received the number of terms
        compressor, workers, steps = build(spec), world.size - 1, 5
        assert isinstance(compressor, Compressor)
        buckets = list(_gradients(job))
        total, pushed, replied = sum(bucket.numel for bucket in buckets), 0, 0
        for bucket in buckets:
            coder = PointToPointCodec(
                compressor, Segment(bucket.numel, 1, share=bucket.numel / total), torch.float32
            )
            if coder.nbytes + FACTOR_BYTES < bucket.nbytes:
                sizes = CodeSumServer(coder).part_sizes(workers)
                pushed, replied = pushed + sum(sizes), replied + sum(sizes[:-1]) + coder.nbytes + FACTOR_BYTES
            else:
                pushed, replied = pushed + bucket.nbytes, replied + bucket.nbytes
        world.progress.drain()
        before = world.traffic.sent, world.traffic.saved
        job.train(steps)
        world.progress.drain()
        sent = world.gather(world.traffic.sent - before[0])
        saved = world.gather(world.traffic.saved - before[1])
        dense = sum(bucket.nbytes for bucket in buckets)
        assert (sent[-1], saved[-1]) == (steps * workers * replied, steps * workers * (dense - replied))
        assert sent[:-1] == [steps * pushed] * workers
        assert saved[:-1] == [steps * (dense - pushed)] * workers


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_reference_has_the_same_bits_on_both_sides(world: Any, mode: Any) -> None:
    job = Job(world, ParameterServer(mode), SPECS[0])
    with job.run:
        for steps in (3, 8):
            job.train(steps)
            references = world.gather(
                {i: shard.codec.state_dict() for i, shard in shards(job).items() if shard.codec}
            )
            buckets = _gradients(job)
            for name, view in buckets.views.items():
                view.copy_(dict(job.model.named_parameters())[name].detach())
            known = {i: shard for server in references for i, shard in server.items()}
            assert known
            for i, shard in known.items():
                own = [values for name, values in shard.items() if name == f"group {world.rank}"]
                for values in own:
                    for view in buckets.buckets[i].views:
                        part = slice(*buckets.buckets[i].extent(view))
                        assert torch.equal(values[part].view(view.shape), view.cpu())
                assert len(own) == (world.rank < world.size - 1)


@pytest.mark.parametrize(
    ("mode", "spec"), [("sync", SPECS[1]), ("async", SPECS[0]), ("elastic", "ef+topk:ratio=0.1")]
)
def test_compressed_training_converges(world: Any, mode: Any, spec: str) -> None:
    job = Job(world, ParameterServer(mode, interval=2), spec)
    before = job.loss()
    with job.run:
        job.train(40)
    assert job.loss() < 0.3 * before


@pytest.mark.parametrize("groups", [1, None])
def test_elastic_conserves_the_sum_of_all_models(world: Any, groups: int | None) -> None:
    """Without gradients the models and the centre only move towards each other."""
    job = Job(world, ParameterServer("elastic", groups=groups, interval=1), "ef+maxnorm:bits=3", lr=0.0)
    with job.run:
        workers = world.size - 1
        leaders = list(range(workers)) if groups is None else [0]
        with torch.no_grad():
            for i, p in enumerate(job.model.parameters()):
                p += 1e-2 * (world.rank + 1 if groups is None else 1) * (i + 1)
        job.train(1)
        sums = []
        for steps in (1, 20):
            job.train(steps)
            own = job.vector().astype(np.float64)
            with job.run.averaged():
                centre = job.vector().astype(np.float64)
            models = world.gather(own)
            sums.append(centre + sum(models[rank] for rank in leaders))
            spread = max(float(np.abs(models[rank] - centre).max()) for rank in leaders)
        np.testing.assert_allclose(sums[1], sums[0], rtol=0, atol=1e-5)
        assert spread < 5e-3  # of 4e-2


@pytest.mark.parametrize("groups", [None, 2])
def test_sync_is_allreduce_to_the_precision_of_the_codes(world: Any, groups: int | None) -> None:
    """With groups of unequal size too."""
    groups = None if groups is None else min(groups, world.size - 1)

    def trained(part: Any, strategy: Any, spec: str) -> np.ndarray:
        job = Job(part, strategy, spec)
        start = job.vector()
        with job.run:
            job.train(15, world.rank)
        return job.vector() - start

    served = trained(world, ParameterServer(groups=groups), "bf16")
    part = world.split(int(world.rank == world.size - 1))
    reduced = [world.gather(trained(part, AllReduce(), spec))[0] for spec in ("none", "bf16")]
    part.close()
    for expected in reduced:
        assert np.linalg.norm(served - expected) < 2e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("mode", ["sync", "async", "elastic"])
def test_a_resumed_run_has_the_same_bits(world: Any, mode: Any) -> None:
    def begin() -> Job:
        groups = None if mode == "sync" else 1  # sums have a fixed order
        return Job(world, ParameterServer(mode, groups=groups, interval=2), SPECS[0])

    straight = begin()
    with straight.run:
        straight.train(6)
        straight.train(5)
    first = begin()
    with first.run:
        first.train(6)
        state = copy.deepcopy(first.run.state_dict())
        first.train(3)
    second = begin()
    with second.run:
        second.taken = 6
        second.run.load_state_dict(state)
        second.train(5)
    np.testing.assert_array_equal(second.vector(), straight.vector())


def test_a_state_of_another_compression_is_refused(world: Any) -> None:
    job = Job(world, ParameterServer(groups=1), "ef+maxnorm")
    with job.run:
        state = job.run.state_dict()["strategy"]
        if world.rank == 0:
            state["store"]["codes"] = {}
            with pytest.raises(HpcsgdError, match="was written with another compression"):
                job.run.strategy.load_state_dict(state)


@pytest.mark.parametrize("nonfinite", ["skip", "error"])
def test_gradient_that_is_not_finite_is_skipped_or_an_error(world: Any, nonfinite: str) -> None:
    job = Job(world, ParameterServer("async", max_staleness=0), "ef+maxnorm", nonfinite=nonfinite)
    with job.run:
        job.train(3)
        for x, y in job.run.batches([data(world.rank, 0)], steps=1):
            before = job.vector()
            job.run.zero_grad()
            nn.functional.mse_loss(job.model(x * torch.nan), y).backward()
            if nonfinite == "error":
                with pytest.raises(HpcsgdError, match=f"rank {world.rank}: the gradient of .* is not finite"):
                    job.run.step()
                for p in job.model.parameters():
                    assert p.grad is not None
                    p.grad.zero_()
            job.run.step()
            # Momentum alone, or nothing; and the residuals.
            assert np.abs(job.vector() - before).max() < 0.1
        job.train(2)
    assert np.isfinite(job.vector()).all()


def test_schemes_that_servers_cannot_decode_are_refused(world: Any) -> None:
    class Own(Compressor):
        pass

    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for compressor, text in (
        (build("ef+powersgd"), "depends on its previous result"),
        (Own(), "is not registered"),
    ):
        with pytest.raises(BadOption, match=text):
            Run(model, optimizer, ParameterServer(), comm=world, compress=compressor)
