"""Buffers are common in an evaluation and at the end, and each rank's own in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import LASGD, SGP, AllReduce, BadOption, Disagreement, HpcsgdError, LocalSGD, Run

pytestmark = pytest.mark.mpi


class Kinds(nn.Module):
    """Buffers of all kinds; `now(rank)` sets values of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("brain", torch.zeros(2, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64).conj())
        self.register_buffer("sine", torch.zeros(2, dtype=torch.complex64).conj().imag)
        with torch.inference_mode():
            self.register_buffer("cache", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("wide", torch.zeros(3, 1).expand(3, 4))
        self.register_buffer("none", None)

    def now(self, rank: int) -> None:
        self.mean = torch.full((3,), float(rank))  # another tensor, as modules may
        self.brain.fill_(rank)
        self.phase.fill_(rank * 1j)
        self.sine.fill_(rank)
        with torch.inference_mode():
            self.cache.fill_(rank)
        self.count.fill_(rank)
        self.wide[:, :1] = rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def run_of(model: nn.Module, world: Any, strategy: Any = None, **options: Any) -> Run:
    return Run(
        model, torch.optim.SGD(model.parameters(), 0.1), strategy or LocalSGD(2), comm=world, **options
    )


def expected_numbers(setting: str, world: Any) -> tuple[float, float]:
    """Values of floating-point and of integer buffers."""
    mean = (world.size - 1) / 2
    return {"broadcast": (0, 0), "average": (mean, 0), "local": (world.rank, world.rank)}[setting]


def check(model: Kinds, number: float, integer: float) -> None:
    assert torch.allclose(model.mean, torch.full((3,), float(number)))
    assert torch.allclose(model.brain.float(), torch.full((2,), float(number)))
    assert torch.allclose(model.phase, torch.full((2,), number * 1j))
    assert torch.allclose(model.sine, torch.full((2,), float(number)))
    assert torch.allclose(model.cache, torch.full((2,), float(number)))
    assert torch.allclose(model.wide, torch.full((3, 4), float(number)))
    assert int(model.count) == integer and model.wide.stride() == (1, 0)


@pytest.mark.parametrize("setting", ["broadcast", "average", "local"])
def test_an_evaluation_has_common_buffers_and_gives_each_rank_its_own_back(world: Any, setting: str) -> None:
    model = Kinds()
    run = run_of(model, world, buffers=setting)
    for _ in range(2):
        model.now(world.rank)
        with pytest.raises(ZeroDivisionError), run.averaged():
            check(model, *expected_numbers(setting, world))
            if setting != "local" and world.size > 1:
                model.now(9)
            raise ZeroDivisionError
        check(model, world.rank, world.rank)
    run.close()
    check(model, *expected_numbers(setting, world))


@pytest.mark.parametrize("setting", ["broadcast", "average"])
def test_buffers_are_synchronised_every_few_steps(world: Any, setting: str) -> None:
    model = Kinds()
    with run_of(model, world, buffers=setting, buffer_period=2) as run:
        for step, x in enumerate(run.batches([torch.ones(2, 4)] * 4)):
            model.now(world.rank)
            run.optimizer.zero_grad()
            model(x).sum().backward()
            run.step()
            check(model, *expected_numbers(setting if step % 2 else "local", world))


@pytest.mark.not_on_standin("torch sets no data of its tensors that are conjugated or of inference mode")
def test_virtual_nodes_have_buffers_each(world: Any) -> None:
    model = Kinds()
    total = 2 * world.size
    with run_of(model, world, SGP("ring"), virtual_nodes=total, buffers="average", buffer_period=1) as run:
        for index, x in enumerate(run.batches([[torch.ones(2, 4)], [torch.ones(2, 4)]])):
            model.now(2 * world.rank + index)
            run.optimizer.zero_grad()
            model(x).sum().backward()
            run.step()
        for _ in run.each_peer():
            check(model, (total - 1) / 2, 0)


CHANGES: dict[str, Callable[[Kinds], Any]] = {
    "shape": lambda model: model.register_buffer("mean", torch.zeros(5)),
    "dtype": lambda model: model.register_buffer("mean", torch.zeros(3).double()),
    "absent": lambda model: delattr(model, "mean"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_unequal_buffers_are_named_on_all_ranks(world: Any, change: Callable[[Kinds], Any]) -> None:
    if world.size == 1:
        pytest.skip("needs 2 ranks")
    for options in ({}, {"local": ["mean"]}, {"buffers": "local"}):
        model = Kinds()
        run = run_of(model, world, **options)
        if world.rank == 1:
            change(model)
        if options:
            with run.averaged():
                pass
        else:
            with (
                pytest.raises(HpcsgdError, match=r"rank 1: buffer mean(.|\n)*local=\['mean'\]"),
                run.averaged(),
            ):
                pass


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"buffer_period": 1, "buffers": "local"}, "leaves alone"),
        ({"buffer_period": 1, "strategy": LASGD()}, "LASGD"),
    ],
)
def test_a_period_that_cannot_be(world: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadOption, match=match):
        run_of(Kinds(), world, **options)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("broadcast", lambda rank, size: 0.0),
        ("average", lambda rank, size: (size - 1) / 2),
        ("local", lambda rank, size: float(rank)),
    ],
)
def test_statistics_of_batch_norm(world: Any, setting: str, expected: Callable[[int, int], float]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Run(model, optimizer, comm=world, buffers=setting) as run:
        with torch.no_grad():
            model[1].running_mean.fill_(world.rank)
            model[1].num_batches_tracked.fill_(world.rank)
        with run.averaged():
            value = expected(world.rank, world.size)
            assert torch.allclose(model[1].running_mean, torch.full((3,), value))
            count = world.rank if setting == "local" else 0
            assert int(model[1].num_batches_tracked) == count


def add_to_frozen(world: Any, strategy: Any, number: float, **options: Any) -> tuple[nn.Module, Run]:
    """Return a model whose first layer is frozen, after steps in which each rank adds a number to it."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    nn.init.zeros_(model[0].weight)
    run = run_of(model, world, strategy, **options)
    for _ in range(3):
        run.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        run.step()
        model[0].weight.data += number
    return model, run


@pytest.mark.parametrize("setting", ["broadcast", "average", "local"])
def test_frozen_parameters_that_follow_each_rank_are_treated_as_buffers(world: Any, setting: str) -> None:
    model, run = add_to_frozen(world, LocalSGD(2), world.rank, buffers=setting)
    own, expected = torch.full((3, 4), 3.0 * world.rank), 3 * expected_numbers(setting, world)[0]
    with run.averaged():
        torch.testing.assert_close(model[0].weight.detach(), torch.full((3, 4), float(expected)))
    torch.testing.assert_close(model[0].weight.detach(), own)
    assert isinstance(model[0].weight, nn.Parameter) and not list(model.buffers())
    run.close()
    torch.testing.assert_close(model[0].weight.detach(), torch.full((3, 4), float(expected)))


@pytest.mark.parametrize("call", ["check", "averaged", "close"])
def test_frozen_parameters_of_equal_models_must_be_equal(world: Any, call: str) -> None:
    add_to_frozen(world, AllReduce(), 1.0)[1].close()
    _, run = add_to_frozen(world, AllReduce(), world.rank)
    if world.size == 1:
        return run.close()
    with pytest.raises(Disagreement, match=r"0\.weight differs from that of rank 0 at step 3"):
        if call == "averaged":
            with run.averaged():
                pass
        else:
            getattr(run, call)()
    return None


def test_frozen_parameters_of_equal_models_may_be_local(world: Any) -> None:
    model, run = add_to_frozen(world, AllReduce(), world.rank, local=["0.weight"])
    run.close()
    torch.testing.assert_close(model[0].weight.detach(), torch.full((3, 4), 3.0 * world.rank))
