"""Who is to blame for a wait, from what the ranks say and what is known of those that say nothing."""

from __future__ import annotations

import pytest

from hpcsgd.diagnostics.activity import Moved
from hpcsgd.errors import in_words
from hpcsgd.mpi.stall_report import Standing, blamed, progress_of, stand_still, waits
from hpcsgd.mpi.waiting import Waiting


def rank(*waiting: Waiting, ago: float = 100.0, step: int = 7) -> Standing:
    return Standing(Moved(ago, step, "a step", False), waiting)


def silent(ago: float) -> Standing:
    return Standing(Moved(ago, 6, "a step", False), None)


def on(*ranks: int, seconds: float = 100.0, what: str = "a sum") -> Waiting:
    return Waiting(what, seconds, ranks)


def test_the_end_of_a_chain_is_blamed() -> None:
    known = {0: rank(on(1)), 1: rank(on(3)), 2: rank(), 3: rank()}
    assert blamed(0, known, 4) == [3], "not rank 2, which nobody waits for"
    assert waits(known, [3]) == ["rank 0 waits for rank 1 in a sum", "rank 1 waits for rank 3 in a sum"]


def test_a_rank_that_says_nothing_is_blamed_whatever_is_known_of_it() -> None:
    assert blamed(0, {0: rank(on(1, 2)), 1: silent(3.0), 3: rank()}, 4) == [1, 2]


def test_all_that_do_not_wait_are_blamed_where_nobody_knows_for_whom() -> None:
    known = {0: rank(on()), 1: rank(), 2: rank(on()), 3: silent(200.0)}
    assert blamed(0, known, 4) == [1, 3]
    assert "1 behind; it does not answer" in progress_of(3, known)
    assert progress_of(5, known) == "does not answer"


def test_nobody_is_blamed_where_all_wait_and_those_behind_come_first() -> None:
    known = {0: rank(on(1)), 1: rank(on(0, what="another"), step=3)}
    assert blamed(0, known, 2) == []
    assert [line[:6] for line in waits(known, [])] == ["every ", "rank 1", "rank 0"]


@pytest.mark.parametrize(("ago", "still"), [(99.0, True), (3.0, False)])
def test_who_moves_keeps_nobody_waiting(ago: float, still: bool) -> None:
    known = {0: rank(on(1, seconds=99.0)), 1: rank(ago=ago)}
    assert stand_still([1], known, 50.0) is still
    assert stand_still([1, 2], known, 50.0), "nothing is known of rank 2"
    together = {0: known[0], 1: rank(on(0, seconds=ago))}
    assert stand_still([], together, 50.0) is still


def test_many_ranks_are_few_words() -> None:
    assert in_words([5]) == "rank 5" and in_words([2, 0, 1]) == "ranks 0, 1, 2"
    assert in_words([*range(3, 900), 0, 1]) == "ranks 0, 1, 3 to 899"
