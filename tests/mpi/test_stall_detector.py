"""One rank makes the report of a stall, and all have it; without that rank each makes its own."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import pytest

from hpcsgd.mpi import stall_detector
from hpcsgd.mpi.waiting import Explanation

SECONDS = 50.0  # that the ranks have waited


def explain(world: Any) -> list[Explanation]:
    """The report that each rank has, and whether another rank prints it."""
    detector = world._runtime.stall_detector
    detector._reporters.clear()
    detector._reported = -math.inf, Explanation()
    world.gather(None)
    return list(world.gather(detector.explain(SECONDS)))


@pytest.mark.mpi(min_size=2)
def test_all_ranks_have_the_report_and_one_prints_it(world: Any) -> None:
    texts, blocking, elsewhere = zip(*explain(world), strict=True)
    assert len(set(texts)) == 1 == len(set(blocking)) and texts[0]
    assert sorted(elsewhere) == [False] + [True] * (world.size - 1)


@pytest.mark.mpi(min_size=2)
def test_a_report_that_never_comes_is_made_by_those_that_wait(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall_detector, "_LONGEST_REPORT", 0.5)
    detector, last = world._runtime.stall_detector, world.size - 1
    detector._reported = -math.inf, Explanation()
    detector._reporters = {"explain": (last, time.monotonic())}  # that rank has been chosen, and does nothing
    world.gather(None)
    report, _, elsewhere = detector.explain(SECONDS) if world.rank != last else Explanation()
    assert not elsewhere and bool(report) == (world.rank != last)
    world.gather(None)


@pytest.mark.mpi(min_size=2)
def test_both_threads_of_the_reporting_rank_have_its_report(world: Any) -> None:
    """The error of either may be the one that is printed."""
    detector, found = world._runtime.stall_detector, []
    detector._reported, detector._reporters = (-math.inf, Explanation()), {}
    world.gather(None)
    if world.rank == 0:
        other = threading.Thread(target=lambda: found.append(detector.explain(SECONDS)))
        other.start()
        found.append(detector.explain(SECONDS))
        other.join()
        assert found[0] == found[1] and found[0].report and not found[0].elsewhere
    world.gather(None)
