"""Optimizers that are wrapped in others."""

from __future__ import annotations

import gc
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import DSGD, AllReduce, HpcsgdError, LocalSGD, Run


class Wrapped(torch.optim.Optimizer):
    """A wrapper that is no optimizer of its own, as that of Accelerate."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)


@pytest.mark.mpi(min_size=2)
def test_the_optimizer_inside_of_a_wrapper_is_watched(world: Any) -> None:
    model = nn.Linear(2, 1)
    optimizer = Wrapped(torch.optim.SGD(model.parameters(), 0.1))
    with Run(model, optimizer, comm=world) as run:
        model(torch.ones(1, 2)).sum().backward()
        with pytest.raises(HpcsgdError, match=r"optimizer\.step\(\) was called instead of run\.step"):
            optimizer.step()
        run.step()
    optimizer.step()


@pytest.mark.mpi
@pytest.mark.parametrize("steps_itself", [False, True])
def test_an_optimizer_that_the_loop_makes_is_a_warning(world: Any, steps_itself: bool) -> None:
    model = nn.Linear(2, 1)
    before = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    before.step()
    optimizer: Any = torch.optim.Adam(model.parameters())
    with Run(model, optimizer, comm=world) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            if step == 3:
                optimizer = torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            if steps_itself and step >= 3:
                optimizer.step()
            run.step()
    messages = [str(each.message) for each in caught if "make another one with the new" in str(each.message)]
    assert [m.partition("that the loop")[0].split()[-1] for m in messages] == ["SGD"] * (not steps_itself)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "strategy", [AllReduce, LocalSGD, lambda: DSGD("ring")], ids=["allreduce", "local", "dsgd"]
)
def test_runs_of_one_optimizer_do_not_look_for_others(
    world: Any, strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at all objects of the process takes longer than many steps."""
    model = nn.Linear(2, 1)
    with Run(model, torch.optim.Adam(model.parameters()), strategy(), comm=world) as run:
        monkeypatch.setattr(gc, "get_objects", None)
        for _ in range(2):
            for x in run.batches([torch.ones(1, 2)] * 3):
                run.zero_grad()
                model(x).sum().backward()
                run.step()


@pytest.mark.parametrize("state", [None, [torch.zeros(1, 2)], {}], ids=["none", "list", "dict"])
def test_the_state_of_an_optimizer_of_the_user_s_own_may_be_anything(alone: Any, state: Any) -> None:
    model = nn.Linear(2, 1)
    inner: Any = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = types.SimpleNamespace(
        param_groups=inner.param_groups,
        state=state,
        **{name: getattr(inner, name) for name in ("step", "zero_grad", "state_dict", "load_state_dict")},
    )
    with Run(model, optimizer, comm=alone) as run:
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            run.step()


@pytest.mark.mpi
@pytest.mark.parametrize("overflows", [False, True])
def test_an_overflow_that_the_optimizer_s_scaler_has_seen_leaves_the_step_out(
    world: Any, overflows: bool
) -> None:
    """Also where the loop makes the gradients finite before the step."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with Run(model, optimizer, comm=world) as run:
        before = model.bias.item()
        loss = model(torch.ones(1, 2)).sum()
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.5)
        for p in model.parameters():
            torch.nan_to_num_(p.grad)
        scaler.step(run)
        scaler.update()
    assert before - model.bias.item() == pytest.approx(0.0 if overflows else 0.5)
    assert scaler.get_scale() == (2.0 if overflows else 4.0)
