"""Gradients as a tensor group: order of buckets, misuse, unused, frozen and tied parameters."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpcsgd import AllReduce, HpcsgdError, Run
from hpcsgd.tensors.gradients import Gradients
from tests.support import strategy_rows as s
from tests.support.devices import normal


class Layers(nn.Module):
    """Parameters that autograd finishes in the order of `order`, the first last."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(2)
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
        alone, list(model.named_parameters()), lambda bucket: seen.append(bucket.index), bucket_mib=1e-9
    )
    for number in range(3):
        seen.clear()
        model.zero_grad()
        backward(model)
        assert seen == (list(range(6)) if number else []), (
            "all are complete when backward ends, but the first"
        )
        gradients.finish()
        assert seen == list(range(6)), "and each is reported once"


def test_a_bucket_is_reported_as_soon_as_its_gradients_are_there(alone: Any) -> None:
    model, events = Layers((0, 1, 2)), []
    gradients = Gradients(
        alone, list(model.named_parameters()), lambda b: events.append(b.index), bucket_mib=1e-9
    )
    backward(model)
    gradients.finish()
    events.clear()
    model.layers[0].register_full_backward_hook(lambda *_: events.append("first layer"))
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert events.index(3) < events.index("first layer")


def test_the_end_of_a_pass_is_reported_before_backward_returns(alone: Any) -> None:
    model, ends = Layers((0, 1)), []
    Gradients(alone, list(model.named_parameters()), lambda _: None, lambda: ends.append(1), model=model)
    checkpointed = checkpoint(model, torch.ones(2, 4, requires_grad=True), use_reentrant=False)
    for loss in (model(torch.ones(2, 4)), checkpointed):
        loss.sum().backward()
    assert len(ends) == 2


@pytest.mark.mpi
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_gradients_are_the_mean_when_backward_returns(world: Any, passes: int) -> None:
    model, plain = Layers((0, 1)), Layers((0, 1))
    plain.load_state_dict(model.state_dict())
    with run_of(model, world) as run:
        for step in range(3):
            model.zero_grad()
            plain.zero_grad()
            for number in range(passes):
                model(data(world.rank, step, number)).sum().backward()
                for rank in range(world.size):
                    (plain(data(rank, step, number)).sum() / world.size).backward()
                for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad)
            run.step()
            torch.optim.SGD(plain.parameters(), 0.1).step()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def data(rank: int, step: int, number: int) -> torch.Tensor:
    return normal(2, 4, seed=100 * rank + 10 * step + number)


@pytest.mark.mpi
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 0, 2), (0, 0), (2, 1, 1)])
def test_layers_used_several_times_in_checkpoints(
    world: Any, reentrant: bool, order: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    model, plain = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))
    plain.load_state_dict(model.state_dict())

    def loss(layers: Any, rank: int, step: int, last_plain: bool) -> torch.Tensor:
        x = data(rank, step, 0).requires_grad_()
        for layer in order:
            x = torch.tanh(checkpoint(layers[layer], x, use_reentrant=reentrant))
        # The parameter is used once more, outside of any checkpoint: its gradients come from two passes.
        return (layers[order[0]](x) if last_plain else x).sum()

    with run_of(model, world) as run:
        for step in range(4):
            run.zero_grad()
            plain.zero_grad()
            loss(model, world.rank, step, step % 2 == 0).backward()
            run.synchronize()
            for rank in range(world.size):
                (loss(plain, rank, step, step % 2 == 0) / world.size).backward()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p.grad if p.grad is not None else torch.zeros_like(p), zeros(q))
            run.step()
            torch.optim.SGD(plain.parameters(), 0.1).step()


def zeros(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


@pytest.mark.mpi(min_size=2)
def test_a_derivative_of_the_mean_gradient(world: Any) -> None:
    model, plain = Layers((0, 1)), Layers((0, 1))
    plain.load_state_dict(model.state_dict())
    with run_of(model, world):
        model(data(world.rank, 0, 0)).sum().backward(create_graph=True)
        values = world.gather([p.grad.tolist() for p in model.parameters()])
        assert values == [values[0]] * world.size  # in all bits
        penalty = sum(p.grad.square().sum() for p in model.parameters())
        for p in model.parameters():
            p.grad = None
        penalty.backward()
        loss = sum(plain(data(rank, 0, 0)).sum() / world.size for rank in range(world.size))
        gradients = torch.autograd.grad(loss, list(plain.parameters()), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(zeros(p), zeros(q))


@pytest.mark.mpi(min_size=2)
def test_a_backward_pass_after_a_failed_one_is_an_error_until_skip(world: Any) -> None:
    model = Layers((0, 1))
    with run_of(model, world, bucket_mib=1e-9) as run:
        backward(model)
        run.step()
        before = [p.detach().clone() for p in model.parameters()]
        if world.rank == 0:
            handle = model.layers[0].weight.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                backward(model)
            handle.remove()
            with pytest.raises(HpcsgdError, match=r"run\.skip"):
                backward(model)
            run.skip()
        else:
            backward(model)
            run.step()
        assert all(map(torch.equal, model.parameters(), before)) and run.steps == 2
        run.zero_grad()
        backward(model)
        run.step()
        assert s.same_everywhere(world, model) and not torch.equal(model.layers[0].weight, before[0])


@pytest.mark.mpi(min_size=2)
def test_gradients_changed_before_their_average_are_an_error(world: Any) -> None:
    model = Layers((0, 1))
    run = run_of(model, world, wait="step")
    backward(model)
    run.step()
    backward(model)
    model.layers[0].weight.grad.mul_(0.5)
    with pytest.raises(HpcsgdError, match=r"layers\.0\.weight was changed .*\n.*\n?.*run\.synchronize"):
        run.step()
    run.world.progress.drain()


@pytest.mark.not_on_standin("it has no sparse tensors")
@pytest.mark.mpi(min_size=2)
def test_sparse_gradients_are_summed_by_row(world: Any) -> None:
    torch.manual_seed(1)
    model, plain = (nn.Embedding(9, 3, sparse=True) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    optimizer, reference = (torch.optim.SparseAdam(m.parameters(), 0.1) for m in (model, plain))
    with Run(model, optimizer, AllReduce(), comm=world) as run:
        for step in range(3):
            run.zero_grad()
            reference.zero_grad()
            model(torch.tensor([world.rank, step])).square().sum().backward()
            for rank in range(world.size):
                (plain(torch.tensor([rank, step])).square().sum() / world.size).backward()
            assert model.weight.grad.is_sparse
            run.step()
            reference.step()
    torch.testing.assert_close(model.weight, plain.weight)
    model = nn.Embedding(9, 3, sparse=True)
    with run_of(model, world, sparse="dense") as run:
        model(torch.tensor([world.rank])).sum().backward()
        assert not model.weight.grad.is_sparse
        assert float(model.weight.grad.sum()) == pytest.approx(3)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.mpi(min_size=2)
def test_gradients_are_views_of_the_buffer_however_they_are_zeroed(world: Any, set_to_none: bool) -> None:
    model, plain = Layers((0, 1)), Layers((0, 1))
    plain.load_state_dict(model.state_dict())
    run = run_of(model, world)
    group = run.strategy.gradients.group
    for _ in range(3):
        run.zero_grad(set_to_none)
        plain.zero_grad()
        backward(model)
        backward(plain)
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert p.grad.data_ptr() == group.views[name].data_ptr()
            torch.testing.assert_close(p.grad, q.grad)
        run.step()
        torch.optim.SGD(plain.parameters(), 0.1).step()
    run.close()


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
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_parameter_that_no_rank_uses_stays_as_it_is(world: Any, optimizer: Any) -> None:
    model = Layers((0, 1))
    unused = [p.detach().clone() for p in model.layers[1].parameters()]
    with Run(model, optimizer(model.parameters(), 0.1, weight_decay=0.1), comm=world) as run:
        for _ in range(3):
            run.zero_grad()
            torch.tanh(model.layers[0](torch.ones(2, 4))).sum().backward()
            assert model.layers[0].weight.grad.any()
            run.step()
            assert model.layers[1].weight.grad is None
        assert all(map(torch.equal, model.layers[1].parameters(), unused))


@pytest.mark.mpi
def test_a_layer_frozen_later_stays_as_it_is(world: Any) -> None:
    model = Layers((0, 1))
    with Run(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), comm=world) as run:
        for step in range(6):
            if step == 3:
                model.layers[1].requires_grad_(False)
                frozen = model.layers[1].weight.detach().clone()
            run.zero_grad()
            backward(model)
            run.step()
        assert torch.equal(model.layers[1].weight, frozen)


@pytest.mark.mpi
def test_layers_unfrozen_or_added_later_are_trained_as_on_one_rank(world: Any) -> None:
    torch.manual_seed(5)
    model, head, plain, plain_head = (nn.Linear(4, 4) for _ in range(4))
    plain.load_state_dict(model.state_dict())
    plain_head.load_state_dict(head.state_dict())
    optimizers = [
        torch.optim.SGD([model.weight, *h.parameters()], 0.1)
        for m, h in ((model, head), (plain, plain_head))
        for model in (m,)
    ]
    for m in (model, plain):
        m.weight.requires_grad_(False)
    with Run(model, optimizers[0], comm=world) as run:
        for step in range(6):
            if step == 2:
                model.weight.requires_grad_(True)
                plain.weight.requires_grad_(True)
            if step == 4:
                optimizers[0].add_param_group({"params": [model.bias]})
                optimizers[1].add_param_group({"params": [plain.bias]})
            run.zero_grad()
            optimizers[1].zero_grad()
            head(torch.tanh(model(data(world.rank, step, 0)))).square().sum().backward()
            for rank in range(world.size):
                (plain_head(torch.tanh(plain(data(rank, step, 0)))).square().sum() / world.size).backward()
            run.step()
            optimizers[1].step()
    for p, q in zip(
        [*model.parameters(), *head.parameters()],
        [*plain.parameters(), *plain_head.parameters()],
        strict=True,
    ):
        torch.testing.assert_close(p, q)


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


@pytest.mark.mpi
def test_frozen_parameters_stay_as_they_are(world: Any) -> None:
    model = Layers((0, 1))
    model.layers[0].requires_grad_(False)
    before = model.layers[0].weight.clone()
    run = run_of(model, world)
    if world.size > 1:
        assert list(run.strategy.gradients.group.views) == ["layers.1.bias", "layers.1.weight"]
    backward(model)
    run.step()
    assert model.layers[0].weight.grad is None and torch.equal(model.layers[0].weight, before)
    run.close()


@pytest.mark.mpi
def test_tied_parameters_travel_once(world: Any) -> None:
    model = Layers((0, 1))
    model.layers[1].weight = model.layers[0].weight
    with run_of(model, world) as run:
        views = run.strategy.gradients.group.views if world.size > 1 else dict(model.named_parameters())
        assert sorted(views) == ["layers.0.bias", "layers.0.weight", "layers.1.bias"]
        (model(torch.full((2, 4), 1.0 + world.rank)).sum()).backward()
        run.step()
        total = model.layers[0].weight.sum().item()
        assert len(set(world.gather(total))) == 1
        assert model.layers[1].weight is model.layers[0].weight


@pytest.mark.mpi(min_size=2)
def test_a_copy_or_pickle_of_the_model_is_independent(world: Any) -> None:
    model = Layers((0, 1))
    with run_of(model, world) as run:
        backward(model)
        run.step()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            before = [p.detach().clone() for p in model.parameters()]
            gradients = [p.grad for p in model.parameters()]
            if world.rank == 0:  # no reduction starts, for which others would be needed
                other.zero_grad()
                backward(other)
                torch.optim.SGD(other.parameters(), 0.1).step()
            assert all(map(torch.equal, model.parameters(), before))
            assert all(a is b for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True))
        backward(model)
        run.step()
        assert s.same_everywhere(world, model)
