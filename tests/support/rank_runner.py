"""The run loop of the suite: all ranks run each test marked mpi together; one rank runs each other test."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.watchdog import Watchdog
from tests.support.worlds import worlds

DEFAULT_TIMEOUT = 60.0
_SEVERITY = ["passed", "skipped", "failed"]


class Ranks:
    """Synchronises the ranks after each mpi test, and merges their reports."""

    def __init__(self, watchdog: Callable[[int], Watchdog]) -> None:
        from mpi4py import MPI

        self.comm = MPI.COMM_WORLD.Dup()
        self.rank = self.comm.rank
        self.folder = tempfile.TemporaryDirectory() if self.rank == 0 else None
        self.claims = self.comm.bcast(self.folder.name if self.folder else "")
        self.watchdog = watchdog(self.rank)
        self.stderr = os.fdopen(os.dup(2), "w")
        self.outcome: dict[str, str] = {}
        self.failed_on: dict[str, list[int]] = {}
        self.total: Counter[str] = Counter()
        gc.disable()  # Until all tests are collected: a third of the time of importing torch.

    def gather(self, value: object) -> list[Any]:
        """Return the value of every rank; polls, because ranks may outnumber cores."""
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.001)
        return self.comm.allgather(value)

    def selected(self, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        """Generate the mpi tests, in the same order on all ranks, then tests that no other rank has claimed.

        A file marked `together` is one unit, for its fixtures are expensive. The units with the longest
        deadlines start jobs of several processes: as many ranks as there are cores run these, so that a job
        takes what its deadline allows for; of those half begin with them, and the others at the end.
        """
        yield from filter(is_mpi, items)
        units: dict[str, list[pytest.Item]] = {}
        for item in items:
            if not is_mpi(item):
                together = item.get_closest_marker("together")
                units.setdefault(str(item.path) if together else item.nodeid, []).append(item)
        queue = sorted(units.values(), key=lambda unit: -sum(map(deadline, unit)))
        runs_jobs = self.rank < len(os.sched_getaffinity(0))
        for number in range(len(queue))[:: 1 if runs_jobs and self.rank % 2 == 0 else -1]:
            if not runs_jobs and max(map(deadline, queue[number])) > DEFAULT_TIMEOUT:
                continue
            try:
                Path(self.claims, str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            yield from queue[number]

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or session.config.option.collectonly:
            return None
        for item, following in pairwise(chain(self.selected(session.items), [None])):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        return True

    def pytest_collection_finish(self) -> None:
        # A million objects of modules, which no garbage collection in a test needs to traverse.
        import torch._dynamo  # noqa: F401  # as the first optimizer does

        gc.collect()
        gc.freeze()
        gc.enable()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.watchdog.watch(item.nodeid, deadline(item))
        result = yield
        if is_mpi(item):
            found = self.gather((self.outcome.get(item.nodeid, "passed"), worlds.has_open_run()))
            outcomes = [outcome for outcome, _ in found]
            failed = [rank for rank, outcome in enumerate(outcomes) if outcome == "failed"]
            if failed or any(has_open_run for _, has_open_run in found):
                worlds.discard()
            if failed:
                self.failed_on[item.nodeid] = failed
                if item.config.getoption("maxfail"):
                    item.session.shouldstop = f"{item.nodeid} failed on ranks {failed}"
            self.outcome[item.nodeid] = max(outcomes, key=_SEVERITY.index)
        elif self.outcome.get(item.nodeid) == "failed":
            self.failed_on[item.nodeid] = [self.rank]
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self.outcome.get(report.nodeid, "passed")
        self.outcome[report.nodeid] = max(known, report.outcome, key=_SEVERITY.index)
        if self.rank and report.failed:
            text = [f"\nrank {self.rank}: FAILED {report.nodeid} ({report.when})"]
            text += [report.longreprtext, *(f"-- {name}\n{out}" for name, out in report.sections)]
            print(*text, sep="\n", file=self.stderr, flush=True)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Iterator[None]:
        self.watchdog.watch("the other ranks' tests", 3600.0)
        everything = self.gather((self.outcome, self.failed_on, int(exitstatus)))
        merged: dict[str, str] = {}
        for outcomes, failed_on, _ in everything:
            merged |= outcomes
            self.failed_on |= failed_on
        self.total = Counter(merged.values())
        statuses = {status for *_, status in everything} - {pytest.ExitCode.NO_TESTS_COLLECTED}
        if self.failed_on:
            statuses.add(int(pytest.ExitCode.TESTS_FAILED))
        empty = pytest.ExitCode.OK if merged else pytest.ExitCode.NO_TESTS_COLLECTED
        session.exitstatus = max(statuses, default=int(empty))
        self.watchdog.watch("MPI_Finalize", DEFAULT_TIMEOUT)
        return (yield)

    def pytest_unconfigure(self) -> None:
        if self.rank == 0:
            for test, ranks in sorted(self.failed_on.items()):
                print(f"FAILED {test} on rank {', '.join(map(str, ranks))}")
            print(", ".join(f"{self.total[o]} {o}" for o in ("passed", "failed", "skipped")))


def is_mpi(item: pytest.Item) -> bool:
    return item.get_closest_marker("mpi") is not None


def deadline(item: pytest.Item) -> float:
    """Return the time limit of a test in seconds."""
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark else DEFAULT_TIMEOUT
