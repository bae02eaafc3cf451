"""SyncBatchNorm over MPI: equal to BatchNorm of one process on the batches of all ranks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcsgd import DSGD, LASGD, AllReduce, BadOption, LocalSGD, Run
from tests.support.devices import Random

pytestmark = pytest.mark.mpi
CHANNELS = 3
CASES = {
    "1d": ((), {}),
    "2d": ((4, 5), {}),
    "momentum none": ((4,), {"momentum": None}),
    "not affine": ((4,), {"affine": False}),
    "no running statistics": ((), {"track_running_stats": False}),
}


def batch(rank: int, step: int, shape: tuple[int, ...], dtype: torch.dtype, empty: int = -1) -> Tensor:
    """The batch of a rank: of another size on each, and none on one."""
    size = 0 if rank == empty else 2 + rank
    return Random(100 * step + rank).normal(size, CHANNELS, *shape, dtype=dtype) * 3 + rank


def model_of(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    first = nn.Linear(shape[-1] if shape else CHANNELS, shape[-1] if shape else CHANNELS)
    kind = nn.BatchNorm2d if len(shape) == 2 else nn.BatchNorm1d
    return nn.Sequential(first, kind(CHANNELS, **options)).to(dtype)


def loss_of(output: Tensor) -> Tensor:
    weights = torch.arange(1, CHANNELS + 1, dtype=output.dtype).view(1, -1, *[1] * (output.dim() - 2))
    return 0.02 * ((output.sin() * weights).sum() + output.pow(3).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("empty", [False, True])
def test_equals_one_process_on_all_batches(world: Any, case: str, dtype: torch.dtype, empty: bool) -> None:
    shape, options = CASES[case]
    plain = model_of(shape, options, dtype)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    nobody = world.size - 1 if empty and world.size > 1 else -1
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (plain, model)]
    with Run(model, optimizers[1], AllReduce(), comm=world) as run:
        for step in range(3):
            batches = [batch(rank, step, shape, dtype, nobody) for rank in range(world.size)]
            whole = torch.cat(batches).requires_grad_()
            mine = batches[world.rank].clone().requires_grad_()
            optimizers[0].zero_grad()
            run.zero_grad()
            expected, got = plain(whole), model(mine)
            (loss_of(expected) / world.size).backward()
            loss_of(got).backward()
            start = sum(len(each) for each in batches[: world.rank])
            rows = slice(start, start + len(mine))
            torch.testing.assert_close(got, expected[rows], **close)
            assert whole.grad is not None and mine.grad is not None
            torch.testing.assert_close(mine.grad / world.size, whole.grad[rows], **close)
            for a, b in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad, **close)
            for a, b in zip(model.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(a, b, **close)
            optimizers[0].step()
            run.step()
        model.eval()
        plain.eval()
        if case != "no running statistics":
            torch.testing.assert_close(model(whole), plain(whole), **close)
    assert type(model[1]) is nn.SyncBatchNorm


def sync_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.SyncBatchNorm(3))


def start(world: Any, model: nn.Module, strategy: Any, **options: Any) -> Run:
    return Run(model, torch.optim.SGD(model.parameters(), 0.01), strategy, comm=world, **options)


@pytest.mark.parametrize("make", [lambda: LocalSGD(2), lambda: DSGD("ring")])
def test_statistics_are_those_of_all_ranks(world: Any, make: Any) -> None:
    model = sync_model()
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    whole = torch.cat([batch(rank, 0, (), torch.float32) for rank in range(world.size)])
    with start(world, model, make()) as run:
        model(batch(world.rank, 0, (), torch.float32)).sum().backward()
        run.step()
        expected = 0.1 * model[0](whole).mean(0)
        torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-5, atol=1e-5)


def test_a_repeated_batch_of_weight_0_does_not_count(world: Any) -> None:
    batches = [batch(world.rank, step, (), torch.float32) for step in range(2 if world.rank == 0 else 1)]
    model = sync_model()
    model[1].momentum = 1.0
    with start(world, model, AllReduce()) as run:
        for inputs in run.batches(batches):
            run.zero_grad()
            model(inputs).square().sum().backward()
            before = [p.detach().clone() for p in model[0].parameters()]
            run.step()
    last = torch.nn.functional.linear(batch(0, 1, (), torch.float32), *before)
    torch.testing.assert_close(model[1].running_mean, last.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, last.var(0), rtol=1e-5, atol=1e-5)


def test_copies_are_plain_and_so_is_the_model_of_a_dropped_run(world: Any) -> None:
    model = sync_model()
    run = start(world, model, AllReduce())
    for duplicate in (copy.deepcopy(model[1]), pickle.loads(pickle.dumps(model[1]))):
        assert type(duplicate) is nn.SyncBatchNorm
        for name, value in model[1].state_dict().items():
            assert torch.equal(duplicate.state_dict()[name], value)
    del run
    if world.rank == 0:
        model(torch.randn(5, 3))  # no wait for the other ranks


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(("make", "nodes"), [(LASGD, 1), (lambda: DSGD("ring"), 2)])
def test_ranks_that_do_not_step_together_are_refused(world: Any, make: Any, nodes: int) -> None:
    with pytest.raises(BadOption, match="SyncBatchNorm needs ranks that compute each step together"):
        start(world, sync_model(), make(), virtual_nodes=nodes * world.size)
