"""Gradients as a tensor group: order of buckets, misuse, unused, frozen and tied parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import AllReduce, HpcsgdError, Run
from hpcsgd.tensors.gradients import Gradients


class Layers(nn.Module):
    """Parameters that autograd finishes in the order of `order`, the first last."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in order)
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in self.order:
            x = torch.tanh(self.layers[index](x))
        return x


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 4)).sum().backward()


def run_of(model: nn.Module, world: Any, **options: Any) -> Run:
    return Run(model, torch.optim.SGD(model.parameters(), 0.1), AllReduce(), comm=world, **options)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_buckets_are_reported_in_order_in_any_order_of_autograd(alone: Any, order: tuple[int, ...]) -> None:
    seen: list[int] = []
    model = Layers(order)
    gradients = Gradients(
        alone, list(model.named_parameters()), lambda bucket: seen.append(bucket.index), 1e-9
    )
    for _ in range(2):
        seen.clear()
        model.zero_grad()
        backward(model)
        assert seen == list(range(6)), "all are complete when backward ends"
        gradients.finish()
        gradients.reset()
        assert seen == list(range(6)), "and each is reported once"


def test_a_bucket_is_reported_as_soon_as_its_gradients_are_there(alone: Any) -> None:
    model, events = Layers((0, 1, 2)), []
    Gradients(alone, list(model.named_parameters()), lambda b: events.append(b.index), 1e-9)
    model.layers[0].register_full_backward_hook(lambda *_: events.append("first layer"))
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert events.index(3) < events.index("first layer")


def test_a_second_backward_is_an_error_that_names_the_parameter(alone: Any) -> None:
    model = Layers((0, 1))
    run_of(model, alone)
    backward(model)
    with pytest.raises(HpcsgdError, match=r"second gradient for layers\.1\..* before step"):
        backward(model)


def test_backward_after_synchronize_is_an_error(alone: Any) -> None:
    model = Layers((0, 1))
    run = run_of(model, alone)
    backward(model)
    run.synchronize()
    run.synchronize()  # once more changes nothing
    with pytest.raises(HpcsgdError, match=r"run\.accumulate"):
        backward(model)


def test_a_sparse_gradient_is_an_error(alone: Any) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    run_of(model, alone)
    with pytest.raises(HpcsgdError, match="gradient of weight is sparse"):
        model(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_views_of_the_buffer_however_they_are_zeroed(alone: Any, set_to_none: bool) -> None:
    model, plain = Layers((0, 1)), Layers((0, 1))
    plain.load_state_dict(model.state_dict())
    run = run_of(model, alone)
    group = run.strategy.gradients.group
    for _ in range(3):
        run.zero_grad(set_to_none)
        plain.zero_grad()
        backward(model)
        backward(plain)
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert p.grad.data_ptr() == group.views[name].data_ptr()
            assert torch.equal(p.grad, q.grad)
        run.step()
        torch.optim.SGD(plain.parameters(), 0.1).step()


def test_a_gradient_that_is_not_zeroed_adds_up_as_in_torch(alone: Any) -> None:
    model, plain = Layers((0,)), Layers((0,))
    plain.load_state_dict(model.state_dict())
    run, optimizer = run_of(model, alone), torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(3):
        backward(model)
        run.step()
        backward(plain)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.mpi
def test_an_unused_parameter_counts_as_zeros_except_alone(world: Any) -> None:
    model = Layers((0, 1))
    with run_of(model, world) as run:
        torch.tanh(model.layers[0](torch.ones(2, 4))).sum().backward()
        run.synchronize()
        unused = model.layers[1].weight.grad
        assert unused is None if world.size == 1 else not unused.any()
        assert model.layers[0].weight.grad.any()


def test_an_unused_parameter_may_be_an_error(alone: Any) -> None:
    model = Layers((0, 1))
    run = run_of(model, alone, unused="error")
    torch.tanh(model.layers[0](torch.ones(2, 4))).sum().backward()
    with pytest.raises(HpcsgdError, match=r"layers\.1\.bias, layers\.1\.weight"):
        run.step()


@pytest.mark.mpi(min_size=2)
def test_a_parameter_that_one_rank_does_not_use(world: Any) -> None:
    model = Layers((0, 1))
    with run_of(model, world, bucket_mib=1e-9) as run:
        for _ in range(3):
            run.zero_grad()
            x = torch.tanh(model.layers[0](torch.ones(2, 4)))
            (model.layers[1](x) if world.rank == 0 else x).sum().backward()
            run.step()
        mean = model.layers[1].weight.grad.sum().item()
        assert mean and len(set(world.gather(mean))) == 1


def test_frozen_parameters_stay_as_they_are(alone: Any) -> None:
    model = Layers((0, 1))
    model.layers[0].requires_grad_(False)
    before = model.layers[0].weight.clone()
    run = run_of(model, alone)
    assert list(run.strategy.gradients.group.views) == ["layers.1.bias", "layers.1.weight"]
    backward(model)
    run.step()
    assert model.layers[0].weight.grad is None and torch.equal(model.layers[0].weight, before)


@pytest.mark.mpi
def test_tied_parameters_travel_once(world: Any) -> None:
    model = Layers((0, 1))
    model.layers[1].weight = model.layers[0].weight
    with run_of(model, world) as run:
        views = run.strategy.gradients.group.views
        assert sorted(views) == ["layers.0.bias", "layers.0.weight", "layers.1.bias"]
        (model(torch.full((2, 4), 1.0 + world.rank)).sum()).backward()
        run.step()
        total = model.layers[0].weight.sum().item()
        assert len(set(world.gather(total))) == 1
        assert model.layers[1].weight is model.layers[0].weight


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("broadcast", lambda rank, size: 0.0),
        ("average", lambda rank, size: (size - 1) / 2),
        ("local", lambda rank, size: float(rank)),
    ],
)
def test_buffers(world: Any, setting: str, expected: Callable[[int, int], float]) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with run_of(model, world, buffers=setting) as run:
        with torch.no_grad():
            model[1].running_mean.fill_(world.rank)
            model[1].num_batches_tracked.fill_(world.rank)
        with run.averaged():
            value = expected(world.rank, world.size)
            assert torch.allclose(model[1].running_mean, torch.full((3,), value))
            count = world.rank if setting == "local" else 0
            assert int(model[1].num_batches_tracked) == count
