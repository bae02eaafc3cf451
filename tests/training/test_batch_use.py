"""Batches that a loop leaves out, collects, keeps, or takes ahead of their use."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import AllReduce, Disagreement, LocalSGD, Run, Strategy


def start(world: Any, strategy: Strategy) -> Run:
    model = nn.Linear(4, 1).double()
    return Run(model, torch.optim.SGD(model.parameters(), 0.1), strategy, comm=world)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("strategy", "step"), [(AllReduce, 2), (lambda: LocalSGD(2), 3)], ids=["allreduce", "local"]
)
def test_a_batch_that_one_rank_ignores_is_an_error(world: Any, strategy: Any, step: int) -> None:
    run, steps = start(world, strategy()), 0
    loader = [(torch.randn(2, 4).double(), torch.zeros(2, 1).double()) for _ in range(6)]
    text = rf"rank 1: the number of batches differs from that of rank 0, in step {step}\n(.*\n)*.*run\.skip"
    with pytest.raises(Disagreement, match=text):
        for number, (x, y) in enumerate(run.batches(loader)):
            if number == 2 and world.rank == 1:
                continue
            run.zero_grad()
            nn.functional.mse_loss(run.model(x), y).backward()
            run.step()
            steps += 1
    assert steps == step


@pytest.mark.mpi
@pytest.mark.parametrize("steps", [None, 1, 2])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("left_out", ["by none", "by one rank", "by all ranks"])
def test_one_of_several_batches_of_a_step_may_be_left_out(
    world: Any, left_out: str, place: int, steps: int | None
) -> None:
    """Its rank adds nothing for it, as within `no_sync` of DistributedDataParallel."""
    ranks = {"by none": (), "by one rank": (0,), "by all ranks": range(world.size)}[left_out]
    if steps == 1 and place == 0 and len(ranks) == world.size:
        pytest.skip("a batch without gradients, of a loop without steps, counts as one")
    model = nn.Linear(1, 1, bias=False).double()
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        before = model.weight.item()
        batches = [torch.full((1, 1), 1.0 + n).double() for n in range(6)]
        for number, x in enumerate(run.batches(batches, steps=steps)):
            run.zero_grad() if number % 3 == 0 else None
            if number % 3 != place or world.rank not in ranks:
                with run.accumulate():
                    model(x.clone() if steps else x).sum().backward()
            if number % 3 == 2:
                run.step()
        assert run.steps == (steps or 2)
    share = 1 - len(ranks) / world.size
    expected = sum((share if n % 3 == place else 1) * (n + 1) for n in range(3 * (steps or 2)))
    assert before - model.weight.item() == pytest.approx(expected)


@pytest.mark.mpi
@pytest.mark.parametrize("steps", [None, 1, 3])
def test_a_loop_that_looks_ahead_has_the_weights_of_the_batches_it_uses(
    world: Any, steps: int | None
) -> None:
    """Rank 0 has 4 batches, the others one less; the last batch of a loop is used after its end."""
    model = nn.Linear(1, 1, bias=False).double()
    own = [torch.full((1, 1), 1.0 + n).double() for n in range(3 if world.rank else 4)]

    def ahead(batches: Any) -> Iterator[Any]:
        for before in batches:
            for batch in batches:
                yield before
                before = batch
            yield before

    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        for _ in range(2):
            before, taken, found = model.weight.item(), run.steps, []
            for x in ahead(iter(run.batches(own, steps=steps))):
                found.append(run.weight)
                run.zero_grad()
                run.model(x).sum().backward()
                run.step()
            count = steps or 4
            assert run.steps - taken == count
            assert before - model.weight.item() == pytest.approx(sum(range(1, count + 1)))
            assert found == [1, 1, 1, 0 if world.rank else 1][:count]


@pytest.mark.mpi
def test_a_loop_that_uses_its_first_batch_otherwise_does_not_look_ahead(world: Any) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    own = [torch.full((1, 1), 1.0 + n).double() for n in range(3 if world.rank else 4)]
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        before, batches = model.weight.item(), run.batches(own)
        first = next(batches)
        with torch.no_grad():
            model(first)
        for x in batches:
            run.zero_grad()
            run.model(x).sum().backward()
            run.step()
    assert before - model.weight.item() == pytest.approx(2 + 3 + 4)


@pytest.mark.mpi(min_size=2)
def test_collected_batches_of_which_some_are_repeated_are_a_warning(world: Any) -> None:
    run, found = start(world, AllReduce()), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in run.batches([torch.ones(2, 4).double()] * (3 if world.rank else 4)):
            found.append(x)
            if len(found) % 2 == 0:
                run.zero_grad()
                run.model(torch.cat(found[-2:])).sum().backward()
                run.step()
    assert sum("a step uses several batches" in str(each.message) for each in caught) == (world.rank == 0)
    run.close()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kept", [itertools.cycle, list])
def test_batches_that_are_kept_after_their_loop_are_a_warning(world: Any, kept: Any) -> None:
    run = start(world, AllReduce())
    own = [torch.ones(2, 4).double()] * (1 if world.rank else 2)
    batches = kept(run.batches(own))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in itertools.islice(batches if kept is itertools.cycle else batches * 2, 4):
            run.zero_grad()
            run.model(x).sum().backward()
            run.step()
    texts = [str(each.message) for each in caught if "batches that were kept" in str(each.message)]
    assert len(texts) == (world.rank == 0)
    run.close()


@pytest.mark.mpi
@pytest.mark.parametrize("strategy", [AllReduce, lambda: LocalSGD(2)], ids=["allreduce", "local"])
def test_batches_are_collected_before_a_step(world: Any, strategy: Any) -> None:
    run, found = start(world, strategy()), []
    for x in run.batches([torch.ones(2, 4).double() * n for n in range(8)], steps=3):
        found.append(x)
        if len(found) % 2 == 0:
            run.zero_grad()
            run.model(torch.cat(found[-2:])).sum().backward()
            run.step()
    assert run.steps == 3 and len(found) == 6
    run.close()


@pytest.mark.mpi
def test_copies_of_the_model_made_while_a_batch_is_unused(world: Any) -> None:
    run = start(world, AllReduce())
    for number, x in enumerate(run.batches([torch.ones(2, 4).double()] * 3)):
        if number == 1:
            copies = [copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))]
        if number:
            run.zero_grad()
            run.model(x).sum().backward()
            run.step()
    run.close()
    for each in copies:
        each(torch.ones(3, 4).double())


def change(world: Any, ahead: int, accumulated: int) -> float:
    """The change of a weight in two epochs of uneven shards, by a loop that takes batches ahead."""
    model = nn.Linear(1, 1, bias=False).double()
    own = [torch.full((1, 1), 10.0 * world.rank + 1.0 + n).double() for n in range(4 if world.rank else 5)]
    with Run(model, torch.optim.SGD(model.parameters(), 1.0), comm=world) as run:
        before, number = model.weight.item(), 0
        for _ in range(2):
            waiting: list[torch.Tensor] = []
            batches = iter(run.batches(own))
            while (x := next(batches, None)) is not None or waiting:
                waiting += [] if x is None else [x]
                if x is not None and len(waiting) <= ahead:
                    continue
                if number % accumulated == 0:
                    run.zero_grad()
                number += 1
                is_last = number % accumulated == 0
                with contextlib.nullcontext() if is_last else run.accumulate():
                    run.model(waiting.pop(0)).sum().backward()
                if is_last:
                    run.step()
    return before - model.weight.item()


@pytest.mark.mpi
@pytest.mark.parametrize("accumulated", [1, 2, 3])
@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.filterwarnings("ignore")
def test_a_loop_that_looks_ahead_accumulates_as_one_that_does_not(
    world: Any, ahead: int, accumulated: int
) -> None:
    assert change(world, ahead, accumulated) == pytest.approx(change(world, 0, accumulated))
