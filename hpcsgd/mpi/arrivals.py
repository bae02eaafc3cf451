"""The ranks that have reached the start of MPI or of a world, and those that have not, found without MPI."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Collection, Sequence

from hpcsgd.diagnostics import procfs
from hpcsgd.diagnostics.activity import ProcessInfo, ProcessView
from hpcsgd.diagnostics.inspection import inspect
from hpcsgd.errors import format_ranks
from hpcsgd.mpi import launcher
from hpcsgd.mpi.waiting import Explanation

_MOST_DETAILED = 3  # ranks


class Arrivals:
    """The ranks that have reached a start, as far as they are on this machine.

    No message shows it yet, but each process has a record that others of its machine can read. `numbers` are
    those of the ranks in the job.
    """

    def __init__(self, what: str, numbers: Sequence[int], rank: int, timeout: float) -> None:
        self.operation = f"the start of {what}, which all ranks must reach"
        self._phase = self.phase_of(what)
        self._ranks = {number: rank for rank, number in enumerate(numbers)}
        self._rank, self._timeout = rank, timeout
        self._killed = procfs.killed_for_memory()
        self._seen: set[int] = set()
        self._gone: set[int] = set()

    @staticmethod
    def phase_of(what: str) -> str:
        """Return the phase in the record of a rank that has reached the start."""
        return f"at the start of {what}"

    def missing(self) -> list[int]:
        """Return the ranks of this machine that have not arrived."""
        here = self._processes()
        late = {rank for rank, (_, view) in here.items() if not self._has_arrived(view)}
        return sorted(late | self._ended(here))

    def look(self) -> bool:
        """Look at the processes; returns whether one has ended before it arrived, at the last look too."""
        here = self._processes()
        self._seen |= here.keys()
        before, self._gone = self._gone, self._ended(here)
        return bool(before & self._gone)

    def _ended(self, here: Collection[int]) -> set[int]:
        """Ranks of this machine whose process has ended; where all ranks are on it, seen before or not."""
        is_whole = self._rank in here and launcher.shows_all_ranks()
        return {rank for rank in (self._ranks.values() if is_whole else self._seen) if rank not in here}

    def explain(self, seconds: float) -> Explanation:
        """Return the states of the missing ranks, and whether another rank of this machine prints them."""
        lines, is_first = self._report(stacks=True)
        return Explanation(("\n" + " " * 12).join(lines), elsewhere=not is_first)

    def warn(self, seconds: float) -> bool:
        """Print a warning, on one rank of each machine, that some have not arrived."""
        lines, is_first = self._report(stacks=False)
        if is_first and (self.missing() or self._rank == 0):
            limit = f"after {self._timeout:g} s (--timeout, HPCSGD_TIMEOUT) the job ends"
            begin = f"hpcsgd: {seconds:.0f} s in {self.operation}; {limit}:"
            print("\n  ".join([begin, *lines]), file=sys.stderr, flush=True)
        return True

    def _processes(self) -> dict[int, tuple[int, ProcessView | None]]:
        """The process of each rank of this machine, and its record, if it has one."""
        found = {}
        for number, pids in launcher.local_processes().items():
            if number in self._ranks:
                views = {pid: view for pid in pids if (view := _view(pid)) is not None}
                # Not a shell around it, nor a child, which shares its record.
                pid = min(views, default=pids[-1])
                found[self._ranks[number]] = pid, views.get(pid)
        return dict(sorted(found.items()))

    def _has_arrived(self, view: ProcessView | None) -> bool:
        # One that is stopped there does not complete it.
        return view is not None and view.last().phase == self._phase and procfs.can_run(view.info.pid)

    def _report(self, *, stacks: bool) -> tuple[list[str], bool]:
        """Lines, and whether this is the first rank of its machine that has arrived."""
        processes, host = self._processes(), socket.gethostname()
        arrived = [rank for rank, (_, view) in processes.items() if self._has_arrived(view)]
        if not arrived:
            return [], True  # the launcher has not named its processes
        missing = [rank for rank in processes if rank not in arrived]
        lines = [f"{format_ranks(arrived)} of {host} {'wait' if arrived[1:] else 'waits'} for the others"]
        for rank in missing[:_MOST_DETAILED]:
            pid, view = processes[rank]
            lines.append(f"{format_ranks(rank)} ({host}, process {pid}) {_place(view)}")
            found = inspect(pid, view, stacks=stacks, silent=False, killed_before=self._killed)
            lines += [f"  {line}" for line in found]
        if missing[_MOST_DETAILED:]:
            lines.append(f"{format_ranks(missing[_MOST_DETAILED:])} are missing too")
        if ended := self._ended(processes):
            lines.append(f"{format_ranks(ended)} of {host} ended before the start: see the output above")
        if elsewhere := len(self._ranks) - len(processes) - len(ended):
            lines.append(f"nothing is known here of {elsewhere} ranks on other machines")
        return lines, arrived[0] == self._rank


def _view(pid: int) -> ProcessView | None:
    info = ProcessInfo.find(pid)
    with contextlib.suppress(OSError):
        return None if info is None else ProcessView(info)
    return None


def _place(view: ProcessView | None) -> str:
    if view is None:
        return "has not begun: it has made no Run and no World"
    last = view.last()
    if last.phase:
        return f"is {last.phase}, for {last.ago:.0f} s"
    return f"has not reached it; its last operation: {last.operation or 'none'}"
