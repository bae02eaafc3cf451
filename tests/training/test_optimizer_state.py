"""The optimizer state of rank 0 on other ranks: an optimizer that rank 0 alone has loaded is that of all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import LASGD, AllReduce, BadOption, Disagreement, LocalSGD, Run

pytestmark = pytest.mark.mpi


def assert_same_on_all_ranks(world: Any, value: torch.Tensor) -> None:
    assert all(torch.equal(value, each) for each in world.gather(value))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def train(model: nn.Module, optimizer: Any, steps: int, step: Any = None) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 3), number + 1.0)).square().sum().backward()
        step() if step else optimizer.step()


def trained(kind: Any, **options: Any) -> tuple[nn.Module, Any]:
    """Return a model and its optimizer after some steps without hpcsgd."""
    model = network()
    optimizer = kind(model.parameters(), lr=0.05, **options)
    if kind is torch.optim.LBFGS:
        for _ in range(2):
            optimizer.step(lambda: closure(model, optimizer))
    else:
        train(model, optimizer, 4)
    return model, optimizer


def closure(model: nn.Module, optimizer: Any) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.ones(2, 3)).square().sum()
    loss.backward()
    return loss


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.LBFGS, {"max_iter": 3}),
        (torch.optim.Adafactor, {}),
    ],
)
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(1), lambda: LASGD(1)])
def test_ranks_without_a_state_get_that_of_rank_0(
    world: Any, kind: Any, options: dict[str, Any], strategy: Any
) -> None:
    model, optimizer = trained(kind, **options)
    optimizer.param_groups[0]["lr"] = 0.03
    expected = optimizer.state_dict()
    if world.rank > 0:
        model = network()
        optimizer = kind(model.parameters(), lr=0.05, **options)
    with Run(model, optimizer, strategy(), comm=world):
        found = optimizer.state_dict()
    assert str(found) == str(expected)  # tensors, numbers and their order
    assert all(
        each["exp_avg"].requires_grad is False for each in found["state"].values() if "exp_avg" in each
    )


def test_training_goes_on_as_with_the_checkpoint_on_every_rank(world: Any) -> None:
    alone, optimizer = trained(torch.optim.AdamW)
    train(alone, optimizer, 3)
    model, optimizer = trained(torch.optim.AdamW)
    if world.rank > 0:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with Run(model, optimizer, comm=world) as run:
        train(model, run, 3, run.step)
    torch.testing.assert_close(model.state_dict(), alone.state_dict())


def test_states_that_differ_become_that_of_rank_0_where_gradients_are_averaged(world: Any) -> None:
    model, optimizer = trained(torch.optim.Adam)
    mine = model[0].weight
    optimizer.state[mine]["exp_avg"] += world.rank
    optimizer.state[model[2].bias] = {} if world.rank == 1 else optimizer.state[model[2].bias]
    with Run(model, optimizer, comm=world):
        assert_same_on_all_ranks(world, optimizer.state[mine]["exp_avg"])
        assert len(optimizer.state[model[2].bias]) == 3


def test_momentum_of_a_rank_stays_where_models_are_averaged(world: Any) -> None:
    model, optimizer = trained(torch.optim.SGD, momentum=0.9)
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    momentum += world.rank
    before = momentum.clone()
    with Run(model, optimizer, LocalSGD(2), comm=world):
        assert optimizer.state[model[0].weight]["momentum_buffer"] is momentum
    assert torch.equal(momentum, before)


def test_states_of_local_parameters_are_those_of_the_rank(world: Any) -> None:
    model, optimizer = trained(torch.optim.Adam)
    for p in model.parameters():
        optimizer.state[p]["exp_avg"] += world.rank
    before = optimizer.state[model[2].weight]["exp_avg"].clone()
    with Run(model, optimizer, local=["2.*"], comm=world):
        assert torch.equal(optimizer.state[model[2].weight]["exp_avg"], before)
        assert_same_on_all_ranks(world, optimizer.state[model[0].weight]["exp_avg"])


def test_each_of_several_optimizers_gets_its_state(world: Any) -> None:
    model = network()
    parts = [
        torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9),
        torch.optim.Adam(model[2].parameters(), 0.1),
    ]
    if world.rank == 0:
        model(torch.ones(1, 3)).sum().backward()
        for each in parts:
            each.step()
    with Run(model, parts, comm=world):
        assert "momentum_buffer" in parts[0].state[model[0].bias]
        assert parts[1].state[model[2].bias]["step"].item() == 1


class Plain:
    """An optimizer with the usual four methods, and nothing by which its state could be compared."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    def step(self) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_an_optimizer_without_a_state_by_parameter_is_left_alone(world: Any) -> None:
    model = network()
    with Run(model, Plain(model.parameters()), comm=world) as run:
        run.step()


def test_a_tensor_learning_rate_is_copied_in_place(world: Any) -> None:
    model, optimizer = trained(torch.optim.Adam)
    rate = torch.tensor(0.01 if world.rank == 0 else 0.03)
    optimizer.param_groups[0]["lr"] = rate
    if world.rank > 0:
        optimizer.state.clear()
    with Run(model, optimizer, comm=world):
        assert optimizer.param_groups[0]["lr"] is rate and rate.item() == pytest.approx(0.01)


def test_a_state_that_cannot_be_pickled_is_an_error_on_all_ranks(world: Any) -> None:
    model, optimizer = trained(torch.optim.SGD, momentum=0.9)
    if world.rank == 0:
        optimizer.state[model[0].weight]["rule"] = lambda: 0
    if world.size == 1:
        Run(model, optimizer, comm=world).close()
        return
    with pytest.raises(BadOption, match=r"(?s)cannot be pickled.*on every rank before Run"):
        Run(model, optimizer, comm=world)


def test_texts_that_rank_0_does_not_have_are_removed(world: Any) -> None:
    model, optimizer = trained(torch.optim.SGD, momentum=0.9)
    if world.rank > 0:
        optimizer.state["calls"], optimizer.state["more"] = 3, 4  # type: ignore[index]
    with Run(model, optimizer, comm=world):
        assert world.size == 1 or "calls" not in optimizer.state


def test_groups_of_other_sizes_are_an_error(world: Any) -> None:
    model = network()
    parts = [list(model[0].parameters()), list(model[2].parameters())]
    groups = [{"params": each} for each in parts] if world.rank == 0 else [{"params": [*parts[0], *parts[1]]}]
    optimizer = torch.optim.SGD(groups, 0.1)
    if world.size == 1:
        Run(model, optimizer, comm=world).close()
        return
    with pytest.raises(Disagreement, match="list of sizes of parameter groups"):
        Run(model, optimizer, comm=world)
