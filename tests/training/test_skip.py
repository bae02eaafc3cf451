"""`run.skip`: a step that some ranks leave out, with any number of backward passes on the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import LocalSGD, Run, World
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.errors import HpcsgdError
from tests.support import strategy_rows as s
from tests.support.devices import Random

STEPS, LATE = 7, 4


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def loss_of(model: nn.Module, step: int, *ranks: int) -> torch.Tensor:
    """The mean loss of one process over the batches of ranks."""
    generators = [Random(1000 * rank + step) for rank in ranks]
    x = torch.cat([each.normal(3, 4, dtype=torch.float64) for each in generators])
    y = torch.cat([each.normal(3, 2, dtype=torch.float64) for each in generators])
    return nn.functional.mse_loss(model(x), y)


def who_skips(step: int, size: int) -> list[int]:
    """The first step is left out, one in the middle, one by all ranks, and one by rank 0."""
    return {0: [size - 1], 2: [size - 1], 3: list(range(size)), LATE: [0]}.get(step, [])


class Loop:
    """A training loop, which plain training of one process follows.

    Parameters
    ----------
    passes
        Backward passes of a step.
    weight
        Weight of every rank, if any.
    accumulates
        Whether all passes of a step but the last are inside `run.accumulate()`.
    closure
        Whether the optimizer computes the gradients.
    """

    def __init__(
        self,
        passes: Callable[[int], int] = lambda step: 1,
        *,
        weight: float | None = None,
        accumulates: bool = False,
        closure: bool = False,
        **options: Any,
    ) -> None:
        self._passes, self._weight, self._closure, self.options = passes, weight, closure, options
        self._accumulates = accumulates

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self._closure:
            return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step_of(self, run: Run, step: int) -> None:
        run.zero_grad()
        rank, size = run.world.rank, run.world.size
        if rank in who_skips(step, size):
            if step == LATE and not self._closure and not self._accumulates:
                (loss_of(run.model, step, rank) * float("nan")).backward()
            run.skip()
        elif self._closure:
            run.step(lambda: self._evaluate(run, step, rank))
        else:
            for number in range(self._passes(step)):
                loss = (1.0 + number) * loss_of(run.model, step, rank)
                if self._accumulates and number < self._passes(step) - 1:
                    with run.accumulate():
                        loss.backward()
                else:
                    loss.backward()
            run.step(weight=self._weight)

    @staticmethod
    def _evaluate(run: Any, step: int, *ranks: int, model: nn.Module | None = None) -> torch.Tensor:
        run.zero_grad()
        loss = loss_of(model or run.model, step, *ranks)
        loss.backward()
        return loss

    def plain(self, size: int) -> nn.Module:
        """Return the model of one process that trains on all batches."""
        model, ranks = net(), range(size)
        optimizer = self.optimizer(model)
        for step in range(STEPS):
            if who_skips(step, size):
                continue
            if self._closure:
                optimizer.step(lambda step=step: self._evaluate(optimizer, step, *ranks, model=model))
                continue
            optimizer.zero_grad()
            for number in range(self._passes(step)):
                ((1.0 + number) * loss_of(model, step, *ranks)).backward()
            optimizer.step()
        return model


LOOPS = {
    "one pass": Loop(),
    "two passes": Loop(lambda step: 2),
    "a second pass in some steps": Loop(lambda step: 2 if step in (0, LATE, LATE + 1) else 1),
    "accumulated": Loop(lambda step: 3, accumulates=True),
    "weights": Loop(weight=2.0),
    "closure": Loop(closure=True),
    "all used": Loop(unused="error"),
    "late average": Loop(wait="step"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("kind", LOOPS)
def test_all_ranks_leave_out_a_step_that_some_skip(world: Any, kind: str) -> None:
    loop, model = LOOPS[kind], net()
    with Run(model, loop.optimizer(model), comm=world, **loop.options) as run:
        for step in range(STEPS):
            loop.step_of(run, step)
        assert run.steps == STEPS
    assert s.same_everywhere(world, model)
    if world.rank == 0:
        for p, q in zip(model.parameters(), loop.plain(world.size).parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("skipping", ["last", "all"])
def test_weights_after_a_first_step_that_was_left_out(world: Any, skipping: str) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        before = model.weight.item()
        for step in range(3):
            run.zero_grad()
            if step == 0 and (skipping == "all" or world.rank == world.size - 1):
                run.skip()
                continue
            model(torch.full((1, 1), 1.0 + world.rank).double()).sum().backward()
            run.step(weight=1.0 + world.rank)
    counts = range(1, world.size + 1)
    mean = sum(n * n for n in counts) / sum(counts)
    assert before - model.weight.item() == pytest.approx(2 * mean)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("rank", [0, -1])
def test_a_skipped_step_whose_backward_pass_reaches_another_run(world: Any, rank: int) -> None:
    """The pass of a generator computes gradients of the critic too, which its step throws away."""
    models = [nn.Linear(1, 1, bias=False).double() for _ in range(2)]
    runs = [Run(m, torch.optim.SGD(m.parameters(), 0.1)) for m in models]
    before = [m.weight.item() for m in models]
    for step in range(4):
        runs[1].zero_grad()
        models[1](torch.ones(1, 1).double()).sum().backward()
        runs[1].step()
        runs[0].zero_grad()
        if step == 1 and world.rank == rank % world.size:
            runs[0].skip()
        else:
            (models[0].weight + 0 * models[1].weight).sum().backward()
            runs[0].step()
    changes = [start - m.weight.item() for m, start in zip(models, before, strict=True)]
    for run in runs:
        run.close()
    assert changes == pytest.approx([0.3, 0.4])


@pytest.mark.mpi(min_size=2)
def test_a_skipped_step_asks_for_no_place_in_other_runs(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks may have dropped those, and not answer any more."""
    models = [nn.Linear(1, 1, bias=False).double() for _ in range(3)]
    left, *runs = [Run(m, torch.optim.SGD(m.parameters(), 0.1)) for m in models]
    if world.rank != 0:
        left.__exit__(RuntimeError, RuntimeError(), None)
    monkeypatch.setattr(left.world, "place", None)
    for _ in range(2):
        if world.rank == 0:
            runs[0].skip()
        else:
            (models[1].weight + 0 * models[2].weight).sum().backward()
            runs[0].step()
    assert runs[0].steps == 2
    for run in runs:
        run.close()


@pytest.mark.mpi(min_size=2)
def test_a_skipped_step_takes_no_part_in_an_earlier_run_of_its_world(world: Any) -> None:
    models = [nn.Linear(1, 1, bias=False).double() for _ in range(2)]
    with World(device=str(torch.get_default_device())) as own:
        earlier = Run(models[0], torch.optim.SGD(models[0].parameters(), 0.1), comm=own)
        models[0].weight.data += world.rank
        with pytest.raises(HpcsgdError, match="differ"):
            earlier.close()
        assert earlier.world is own
        with Run(models[1], torch.optim.SGD(models[1].parameters(), 0.1), comm=own) as run:
            assert run.world is own
            if world.rank == 0:
                run.skip()
            else:
                models[1](torch.ones(1, 1).double()).sum().backward()
                run.step()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("when", ["before backward", "after backward"])
def test_a_skipped_step_in_which_a_layer_is_unfrozen(world: Any, when: str) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    model[0].requires_grad_(False)
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world) as run:
        for step in range(4):
            model[0].requires_grad_(step >= 2)
            run.zero_grad()
            skips = step == 2 and world.rank == 0
            if not skips or when == "after backward":
                model(torch.ones(1, 1).double()).sum().backward()
            run.skip() if skips else run.step()
    assert run.steps == 4 and s.same_everywhere(world, model)


@pytest.mark.mpi(min_size=2)
def test_a_skipped_step_with_compression_leaves_equal_models(world: Any) -> None:
    loop, model = LOOPS["a second pass in some steps"], net()
    with Run(model, loop.optimizer(model), comm=world, compress=QSGDMaxNorm(bits=8), nonfinite="skip") as run:
        for step in range(STEPS):
            before = [p.detach().clone() for p in model.parameters()]
            loop.step_of(run, step)
            has_changed = not all(map(torch.equal, model.parameters(), before))
            assert has_changed != bool(who_skips(step, world.size))
    assert s.same_everywhere(world, model)


@pytest.mark.mpi(min_size=2)
def test_local_sgd_leaves_a_step_out_on_one_rank(world: Any) -> None:
    loop, model = LOOPS["one pass"], net()
    with Run(model, loop.optimizer(model), LocalSGD(2), comm=world) as run:
        for step in range(STEPS):
            loop.step_of(run, step)
        assert run.steps == STEPS and world.gather(run.steps) == [STEPS] * world.size
    assert s.same_everywhere(world, model)
