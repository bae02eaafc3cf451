"""Hooks, gradients and outputs of the user's own that meet those of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import Run


@pytest.mark.mpi
@pytest.mark.parametrize("calls_model", [True, False])
def test_hooks_added_during_the_run_change_gradients_before_their_average(
    world: Any, calls_model: bool
) -> None:
    def clip(p: Any) -> None:
        p.grad.clamp_(-0.125, 0.125)

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world, bucket_mib=1e-9) as run:
        for step in range(4):
            if step == 2:
                for p in model.parameters():
                    p.register_post_accumulate_grad_hook(clip)
            run.zero_grad()
            x = torch.full((2, 8), float(world.rank + 1))
            (model(x) if calls_model else model.forward(x)).sum().backward()
            largest = max(float(p.grad.abs().max()) for p in model.parameters())
            assert (largest > 0.125) == (step < 2), step
            run.step()


@pytest.mark.mpi
def test_a_model_that_returns_a_parameter_keeps_no_hooks(world: Any) -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.deviation = nn.Linear(2, 1), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.mean(x), self.deviation

    model = Policy()
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world) as run:
        for _ in range(3):
            run.zero_grad()
            mean, deviation = model(torch.ones(3, 2))
            (mean * deviation).sum().backward()
            run.step()
        assert not model.deviation._backward_hooks


@pytest.mark.mpi(min_size=2)
def test_gradients_in_a_flat_buffer_of_the_loop_are_a_warning(world: Any) -> None:
    model = nn.Linear(2, 1)
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world) as run:
        flat = torch.zeros(3)
        model.weight.grad, model.bias.grad = flat[:2].view(1, 2), flat[2:]
        with pytest.warns(RuntimeWarning, match="is a view of other memory, as of a flat buffer"):
            model(torch.ones(3, 2)).sum().backward()
        run.step()
