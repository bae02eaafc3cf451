"""Equally many batches for all ranks; see also the contract of strategies."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hpcsgd import HpcsgdError, Run
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.batches import synchronous_batches


def context_among(others: list[tuple[int | None, bool]], rank: int = 0) -> Any:
    """Return a context whose world gathers (length, has filler) and batches of other ranks' loaders."""
    gathered = [
        iter([[(*other, None)], *([step < (other[0] or 0)] for step in range(9))]) for other in others
    ]

    def gather(own: object, what: str = "") -> list[object]:
        values = [next(value) for value in gathered]
        return [*values[:rank], own, *values[rank:]]

    def meet(call: str, own: object = None) -> list[object]:
        return [own] * size if call == "the comparison of batches taken" else gather(own)

    size = len(others) + 1
    every = SimpleNamespace(ranks=range(size))
    world: Any = SimpleNamespace(rank=rank, global_rank=rank, size=size, all=every, gather=gather, meet=meet)
    return StrategyContext(world=world, parameters=[])


class Refillable(list[str]):
    """Loader that supplies the batch to repeat."""

    def filler(self) -> str:
        return "filler"


def steps(context: Any, loader: Any, uneven: str = "join") -> list[tuple[str, int, int]]:
    """Return each batch, its weight, and the number of ranks with a batch of their own."""
    found = []
    for batch in synchronous_batches([loader], context, uneven):
        found.append((batch, context.weight, context.contributors))
        context.batches.begin_step()
    return found


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_has_run_out_repeats_its_last_batch_with_weight_0(rank: int) -> None:
    context = context_among([(4, False), (3, False)], rank)
    assert steps(context, ["a", "b"]) == [("a", 1, 3), ("b", 1, 3), ("b", 0, 2), ("b", 0, 1)]


def test_a_rank_that_resumes_after_its_last_batch_uses_the_filler() -> None:
    assert steps(context_among([(2, True)]), Refillable()) == [("filler", 0, 1)] * 2
    assert steps(context_among([(2, True)]), Refillable("a")) == [("a", 1, 2), ("a", 0, 1)]
    with pytest.raises(HpcsgdError, match="rank 0: the loader has no batch"):
        steps(context_among([(2, True)]), [])


def test_stop_ends_with_the_shortest_loader() -> None:
    assert steps(context_among([(1, False)]), ["a", "b"], "stop") == [("a", 1, 2)]
    assert steps(context_among([(3, False)]), ["a", "b"], "stop") == [("a", 1, 2), ("b", 1, 2)]
    assert steps(context_among([(3, False)]), [], "stop") == []


def test_without_a_length_the_ranks_check_before_each_step() -> None:
    unsized = (text for text in "ab")
    assert steps(context_among([(3, False)]), unsized) == [("a", 1, 2), ("b", 1, 2), ("b", 0, 1)]


def test_the_first_batch_of_a_step_decides_its_weight() -> None:
    context = context_among([(4, False)])
    weights = []
    for count, _ in enumerate(synchronous_batches([["a"]], context, "join"), 1):
        weights.append(context.weight)
        if count % 2 == 0:
            context.batches.begin_step()
    assert weights == [1, 1, 0, 0]


def test_leaving_the_loop_resets_the_weight() -> None:
    context = context_among([(4, False)])
    batches: Any = synchronous_batches([["a"]], context, "join")
    assert [next(batches), next(batches)] == ["a", "a"]
    context.batches.begin_step()
    next(batches)
    assert context.weight == 0
    assert (context.weight, context.batch_weight) == (0, 0)
    batches.close()
    assert (context.weight, context.batch_weight, context.contributors) == (1, 1, 2)


def test_a_batch_of_several_steps_has_its_weight_in_each() -> None:
    context, found = context_among([(2, False)]), []
    for _ in synchronous_batches([["a"]], context, "join"):
        for _ in range(2):
            found.append((context.weight, context.batch_weight, context.contributors))
            context.batches.begin_step()
    assert found == [(1, 1, 2)] * 2 + [(0, 0, 1)] * 2


def test_a_loop_inside_of_a_loop_has_weights_of_its_own() -> None:
    context, found = context_among([(2, False)]), []
    for _ in synchronous_batches([["a"]], context, "join"):
        inside = context_among([(1, False)])
        inner = synchronous_batches([["b"]], context, "join")
        context.world.meet = inside.world.meet
        for _ in inner:
            found.append(context.weight)
        found.append((context.weight, context.batch_weight))
        context.batches.begin_step()
    assert found == [1, (1, 1), 1, (0, 0)]


def test_weights_that_change_within_a_step_are_told_of_before() -> None:
    context, found = context_among([(3, False)]), []
    context.batches.on_change = lambda: found.append(list(context.batches.current))
    for count, _ in enumerate(synchronous_batches([["a", "b"]], context, "join"), 1):
        if count == 1:
            context.batches.begin_step()
    assert found == [[True, True], [False, True]]


@pytest.mark.parametrize(
    ("workers", "context", "warned"), [(1, None, True), (1, "spawn", False), (0, None, False)]
)
def test_forked_workers_cause_a_warning(
    monkeypatch: pytest.MonkeyPatch, workers: int, context: str | None, warned: bool
) -> None:
    monkeypatch.setattr("multiprocessing.get_start_method", lambda: "fork")
    data = TensorDataset(torch.zeros(2, 1))
    loader: Any = DataLoader(data, num_workers=workers, multiprocessing_context=context)
    monkeypatch.setattr(loader, "_get_iterator", lambda: iter("ab"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(steps(context_among([(2, False)]), loader)) == 2
    assert [w.category for w in caught] == [RuntimeWarning] * warned
    assert all("forkserver" in str(w.message) for w in caught)


@pytest.mark.mpi(min_size=2)
def test_a_repeated_batch_has_weight_0_in_every_step_and_after_a_loop_inside(world: Any) -> None:
    model = torch.nn.Linear(2, 1)
    own = [torch.ones(1, 2)] * (2 if world.rank == 0 else 1)
    found = []
    with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world) as run:
        for x in run.batches(own):
            for each in (x, x, *run.batches([x]), x):
                run.zero_grad()
                run.model(each).sum().backward()
                found.append(run.weight)
                run.step()
        assert run.weight == 1
    last = 1 if world.rank == 0 else 0
    assert found == [1] * 4 + [last] * 4


@pytest.mark.mpi
@pytest.mark.parametrize("late", ["in the loop", "after the loop", "in the next loop"])
def test_accumulated_batches_count_once_each(world: Any, late: str) -> None:
    """Rank r has r + 1 batches, and one step has all: each turn is the mean of those that have one."""
    rows = torch.arange(1.0, 1.0 + world.size * world.size).reshape(world.size, world.size)
    model = torch.nn.Linear(1, 1, bias=False)
    batches = rows[world.rank, : world.rank + 1].reshape(-1, 1, 1)
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        before = model.weight.item()
        for number, x in enumerate(run.batches(list(batches)), 1):
            with run.accumulate():
                run.model(x).sum().backward()
            if late == "in the loop" and number == world.size:
                run.step()
        expected = sum(rows[turn:, turn].mean().item() for turn in range(world.size))
        if late == "in the next loop":
            expected += 1.0
            for x in run.batches([torch.ones(1, 1)]):
                run.model(x).sum().backward()
                run.step()
        elif late == "after the loop":
            run.step()
        assert model.weight.item() - before == pytest.approx(-expected, rel=1e-4)


def two_runs(world: Any) -> tuple[list[Run], list[torch.Tensor]]:
    """Return two runs of one loop, as of a GAN, and its batches: rank 0 has one more."""
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    runs = [Run(m, torch.optim.SGD(m.parameters(), 1.0), comm=world) for m in models]
    return runs, [torch.full((1, 1), world.rank + 1.0)] * (1 if world.rank else 2)


@pytest.mark.mpi(min_size=2)
def test_a_second_run_has_the_weights_of_the_loop_of_the_first(world: Any) -> None:
    runs, own = two_runs(world)
    before = [run.model.weight.item() for run in runs]
    for x in runs[0].batches(own):
        for run in runs:
            run.zero_grad()
            run.model(x).sum().backward()
            assert run.weight == runs[0].weight
            run.step()
    expected = 1.0 + (1.0 + world.size) / 2
    for run, start in zip(runs, before, strict=True):
        assert run.weight == 1
        assert start - run.model.weight.item() == pytest.approx(expected, rel=1e-5)
        run.close()


@pytest.mark.mpi(min_size=2)
def test_a_second_run_accumulates_batches_by_the_weights_of_the_first(world: Any) -> None:
    runs, own = two_runs(world)
    before = [run.model.weight.item() for run in runs]
    for x in runs[0].batches(own):
        for run in runs:
            with run.accumulate():
                run.model(x).sum().backward()
    for run in runs:
        run.step()
    expected = 1.0 + (1.0 + world.size) / 2
    changes = [start - run.model.weight.item() for run, start in zip(runs, before, strict=True)]
    assert changes == pytest.approx([expected, expected], rel=1e-5)
    for run in runs:
        run.close()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shorter", [1, 0])
def test_batches_of_two_loops_of_other_lengths_are_a_warning(world: Any, shorter: int) -> None:
    model = torch.nn.Linear(1, 1)
    longer = [torch.ones(1, 1)] * 3
    lengths = slice(3 - shorter * world.rank // max(1, world.size - 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Run(model, torch.optim.SGD(model.parameters(), 0.1), comm=world) as run:
            for x, y in zip(run.batches(longer[lengths]), run.batches(longer), strict=True):
                run.zero_grad()
                model(x + y).sum().backward()
                run.step()
    texts = [str(each.message) for each in caught if "two loops" in str(each.message)]
    assert len(texts) == (shorter if world.rank == 0 else 0)
    assert all(f"rank {world.size - 1} a new one in one of them only" in text for text in texts)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("left", ["completed", "left by break"])
def test_gradients_of_a_loop_inside_have_its_weights(world: Any, left: str) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        before = model.weight.item()
        outer = [torch.full((1, 1), 10.0 + world.rank)] * (1 if world.rank else 2)
        inner = [torch.full((1, 1), 1.0 + world.rank)] * (3 if left == "left by break" else 2)
        for x in run.batches(outer):
            run.zero_grad()
            for number, y in enumerate(run.batches(inner), 1):
                with run.accumulate():
                    model(y).sum().backward()
                if number == 2:
                    break
            model(x).sum().backward()
            run.step()
        mean = (world.size - 1) / 2
        expected = 2 * 2 * (1 + mean) + 10 + mean + 10
        assert before - model.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.mpi(min_size=2)
def test_weights_of_accumulated_batches_leave_repeated_ones_out(world: Any) -> None:
    """From the first step on: rank r has r + 1 batches, of a sample each, and weighs as many samples."""
    model = torch.nn.Linear(1, 1, bias=False)
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        for _ in range(3):
            before, samples = model.weight.item(), 0
            run.zero_grad()
            for x in run.batches([torch.full((1, 1), 1.0 + world.rank)] * (world.rank + 1)):
                samples += run.weight * len(x)
                with run.accumulate():
                    (model(x).sum() / (world.rank + 1)).backward()
            run.step(weight=samples)
            counts = range(1, world.size + 1)
            expected = sum(n * n for n in counts) / sum(counts)
            assert before - model.weight.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("left", [None, 0.0], ids=["no gradient", "zeros"])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_gradients_that_are_thrown_away_do_not_come_back(
    world: Any, weighted: bool, left: float | None
) -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    other = torch.nn.Parameter(torch.zeros(()))  # the gradient of the second one in backward comes later
    with Run(model, torch.optim.SGD([*model.parameters(), other], 1.0), comm=world) as run:
        for _ in range(2):
            before = model.weight.item(), other.item()
            own = [torch.full((1, 1), 5.0), torch.full((1, 1), 7.0)][: 1 if world.rank else 2]
            for number, x in enumerate(run.batches(own)):
                with run.accumulate():
                    (other * 3 + model(x).sum()).backward()
                if number == 0:
                    taken = model.weight.grad.item()
            # Only rank 0 has a second batch: those before it have been set aside.
            run.zero_grad(set_to_none=left is None)
            with run.accumulate():
                (other + 2 * model.weight.sum()).backward()
            run.step(weight=1.0 if weighted else None)
            assert taken == 5.0
            changes = before[0] - model.weight.item(), before[1] - other.item()
            assert changes == pytest.approx((2.0, 1.0))
            run.zero_grad()
