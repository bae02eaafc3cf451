"""Calls that all ranks must make: different ones, ranks that never meet, busy ranks; means and flags."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from hpcsgd import ADPSGD, LASGD, Disagreement, HpcsgdError, Run, World
from hpcsgd.mpi.rank_calls import RankCalls, certain_mismatch


def run_of(world: Any, strategy: Any = None) -> Run:
    model = nn.Linear(2, 1)
    return Run(model, torch.optim.SGD(model.parameters(), 0.1), strategy, comm=world)


def train(run: Run, batches: Any) -> None:
    for x in batches:
        run.zero_grad()
        run.model(x).sum().backward()
        run.step()


_ONE_MORE: dict[str, Any] = {"in_step": True, "passes": 7}


@pytest.mark.parametrize(
    ("places", "text"),
    [
        # Rank 0 waits in a call that rank 1 has passed by.
        ((RankCalls(3, "run.close()", 5), RankCalls(2, "", 6)), r"run\.close\(\) was called after 5 steps"),
        # Rank 1 has not come to it yet, or is in it.
        ((RankCalls(3, "run.close()", 5), RankCalls(2, "", 5)), None),
        ((RankCalls(3, "run.close()", 5), RankCalls(3, "run.close()", 5)), None),
        # Rank 0 has left the loop in which rank 1 goes on, or both have left it.
        ((RankCalls(1, "", 5, 1, True), RankCalls(1, "", 6, 1)), "was left after 5 steps"),
        ((RankCalls(1, "", 5, 1, True), RankCalls(1, "", 5, 1)), None),
        ((RankCalls(1, "", 5, 1, True), RankCalls(1, "", 6, 1, True)), None),
        # Rank 1 is in the next loop, and waits for rank 0, which is slow.
        ((RankCalls(1, "", 5, 1, True), RankCalls(2, "", 6, 2)), None),
        # Rank 0 has run all its backward passes of step 5, rank 1 runs one more; or is in the next step.
        (
            (RankCalls(1, "", 5, in_step=True, passes=6, completing=True), RankCalls(1, "", 5, **_ONE_MORE)),
            "step 5 has more backward passes on other ranks",
        ),
        ((RankCalls(1, "", 5, in_step=True, passes=6), RankCalls(1, "", 5, **_ONE_MORE)), None),
        (
            (RankCalls(1, "", 5, in_step=True, passes=6, completing=True), RankCalls(1, "", 6, **_ONE_MORE)),
            None,
        ),
        # Ranks of an asynchronous method are at different steps.
        ((RankCalls(3, "run.close()", 5, synchronous=False), RankCalls(2, "", 6)), None),
    ],
)
def test_only_ranks_that_never_meet_are_a_mismatch(places: tuple[RankCalls, ...], text: str | None) -> None:
    for order in ((0, 1), (1, 0)):
        error = certain_mismatch({rank: places[index] for rank, index in enumerate(order)}, [7, 8])
        if text is None:
            assert error is None
        else:
            with pytest.raises(Disagreement, match=f"rank {7 + order.index(0)}: .*{text}"):
                raise error  # type: ignore[misc]


@pytest.mark.parametrize(
    ("last", "awaited", "background", "is_error"),
    [
        # Rank 2 waits at the end of the loop that ranks 0 and 1 have left; computes; is in the next loop.
        ({"at_end": True}, (), True, True),
        ({}, (), True, False),
        ({"at_end": True, "loop": 2}, (), True, False),
        # It waits in a step for ranks that have left; also for one that has not; for what threads do.
        ({"in_step": True}, (0, 1), False, True),
        ({"in_step": True}, (1, 3), False, False),
        ({"in_step": True}, (0, 1), True, False),
        ({"in_step": True}, (), False, False),
        ({"in_step": True, "left": True}, (0, 1), False, False),
    ],
)
def test_ranks_of_asynchronous_methods_wait_for_ranks_that_have_left(
    last: dict[str, Any], awaited: tuple[int, ...], background: bool, is_error: bool
) -> None:
    common = {"synchronous": False, "background": background}
    places = {
        0: RankCalls(3, "run.close()", 5, 1, True, **common),
        1: RankCalls(3, "run.close()", 4, 1, True, **common),
        2: RankCalls(2, "", 6, **{"loop": 1, **common, **last}),
        3: RankCalls(2, "", 6, 1, **common),
    }
    error = certain_mismatch(places, [0, 1, 2, 3], {2: awaited})
    assert (error is not None) == is_error
    if error is not None:
        assert "rank 0: the loop over run.batches() was left for run.close()" in str(error)
    places[0].call = places[1].call = ""  # they have not come to a call yet, and may be in no hurry
    assert certain_mismatch(places, [0, 1, 2, 3], {2: awaited}) is None


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("strategy", [LASGD, ADPSGD])
def test_a_state_that_one_rank_alone_asks_for_is_an_error(world: Any, strategy: Any) -> None:
    if world.size % 2 and strategy is ADPSGD:
        pytest.skip("AD-PSGD needs an even ring")
    with run_of(world, strategy()) as run:
        train(run, run.batches([torch.ones(1, 2)] * 3))
        with pytest.raises(Disagreement, match=r"rank 0 in run\.state_dict\(\); ranks? 1.* in run\.any\(\)"):
            run.state_dict() if world.rank == 0 else run.any(True)
        assert run.state_dict()["steps"] == 3


@pytest.mark.mpi(min_size=2)
def test_different_calls_are_an_error_on_all_ranks(world: Any) -> None:
    with run_of(world) as run:
        with pytest.raises(Disagreement, match=r"rank 0 in run\.averaged\(\); ranks? 1.* in run\.mean\(\)"):
            if world.rank == 0:
                with run.averaged():
                    pass
            else:
                run.mean(1.0)
        assert run.mean(world.rank) == (world.size - 1) / 2


@pytest.mark.mpi
def test_means_and_flags_are_equal_on_all_ranks(world: Any) -> None:
    size = world.size
    with run_of(world) as run:
        assert run.mean(torch.tensor([float(world.rank)], requires_grad=True)) == (size - 1) / 2
        assert run.any(world.rank == size - 1) and run.any(torch.tensor(False)) is False
        assert run.all(True) and run.all(world.rank != 0) is False
    with run_of(world, LASGD()) as run:
        for x in run.batches([torch.ones(1, 2)], steps=2):
            if size > 1:
                with pytest.raises(HpcsgdError, match="inside a loop of an asynchronous strategy"):
                    run.any(True)
            train(run, [x])
        assert run.any(world.rank == 0)


@pytest.mark.mpi(min_size=2)
def test_others_wait_for_a_busy_rank_beyond_the_deadline(world: Any) -> None:
    deadline = 1.0
    with World(timeout=60.0) as own:
        run = run_of(own)
        train(run, [torch.ones(1, 2)])
        own.waiter.timeout = deadline
        if own.rank == 0:
            with run.busy("validation"):
                time.sleep(3 * deadline)  # the work itself: no rank waits for an event of it
        train(run, [torch.ones(1, 2)])
        own.waiter.timeout = 60.0
        assert own.gather(run.steps) == [2] * own.size
        run.close()
