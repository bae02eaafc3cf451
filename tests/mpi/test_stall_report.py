"""Blocking ranks and report lines, from the states of responsive and of silent ranks."""

from __future__ import annotations

import pytest

from hpcsgd.diagnostics.activity import LastActivity
from hpcsgd.errors import format_ranks
from hpcsgd.mpi.stall_report import RankState, blocking_ranks, describe_activity, is_stalled, wait_lines
from hpcsgd.mpi.waiting import PendingWait


def rank(*waiting: PendingWait, ago: float = 100.0, step: int = 7) -> RankState:
    return RankState(LastActivity(ago, step, "a step", False), waiting)


def silent(ago: float) -> RankState:
    return RankState(LastActivity(ago, 6, "a step", False), None)


def on(*ranks: int, seconds: float = 100.0, operation: str = "a sum") -> PendingWait:
    return PendingWait(operation, seconds, ranks)


def test_the_end_of_a_chain_of_waits_is_blocking() -> None:
    states = {0: rank(on(1)), 1: rank(on(3)), 2: rank(), 3: rank()}
    assert blocking_ranks(0, states, 4) == [3], "not rank 2, for which no rank waits"
    assert wait_lines(states, [3]) == ["rank 0 waits for rank 1 in a sum", "rank 1 waits for rank 3 in a sum"]


def test_a_silent_rank_is_blocking_with_and_without_a_state() -> None:
    assert blocking_ranks(0, {0: rank(on(1, 2)), 1: silent(3.0), 3: rank()}, 4) == [1, 2]


def test_all_ranks_that_do_not_wait_are_blocking_where_the_missing_are_unknown() -> None:
    states = {0: rank(on()), 1: rank(), 2: rank(on()), 3: silent(200.0)}
    assert blocking_ranks(0, states, 4) == [1, 3]
    assert "1 behind; it does not answer" in describe_activity(3, states)
    assert describe_activity(5, states) == "does not answer"


def test_no_rank_is_blocking_where_all_wait_and_the_earliest_step_comes_first() -> None:
    states = {0: rank(on(1)), 1: rank(on(0, operation="another"), step=3)}
    assert blocking_ranks(0, states, 2) == []
    assert [line[:6] for line in wait_lines(states, [])] == ["every ", "rank 1", "rank 0"]


@pytest.mark.parametrize(("ago", "stalled"), [(99.0, True), (3.0, False)])
def test_an_active_rank_is_no_stall(ago: float, stalled: bool) -> None:
    states = {0: rank(on(1, seconds=99.0)), 1: rank(ago=ago)}
    assert is_stalled([1], states, 50.0) is stalled
    assert is_stalled([1, 2], states, 50.0), "rank 2 has no state"
    both_wait = {0: states[0], 1: rank(on(0, seconds=ago))}
    assert is_stalled([], both_wait, 50.0) is stalled


def test_many_ranks_are_formatted_as_ranges() -> None:
    assert format_ranks([5]) == "rank 5" and format_ranks([2, 0, 1]) == "ranks 0, 1, 2"
    assert format_ranks([*range(3, 900), 0, 1]) == "ranks 0, 1, 3 to 899"
