"""The start of a world: the first operations, which all ranks must reach, and the ranks that have not."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from hpcsgd.diagnostics import procfs
from hpcsgd.diagnostics.activity import ProcessInfo, ProcessView, phase
from hpcsgd.diagnostics.inspection import inspect
from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import format_ranks
from hpcsgd.mpi import environment, launcher, shutdown
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.waiting import DeadlineWaiter, WaitHooks

_OPERATION = "the start of hpcsgd.World, which all ranks must reach"
_PHASE = "at the start of hpcsgd.World"
_STDERR = 2
_MOST_DETAILED = 3  # ranks


def initialize(timeout: float) -> Any:
    """Return `mpi4py.MPI`, which initialises MPI unless the program has: that waits for all ranks of the job.

    It waits in native code that holds Python's lock, so that at the deadline only the place of this rank is
    printed, and its process ends, and with it the job.

    Parameters
    ----------
    timeout
        Seconds until then.
    """
    with phase("starting MPI, which waits for all ranks"):
        return _wait_for_all_ranks_to_initialize(timeout)


def _wait_for_all_ranks_to_initialize(timeout: float) -> Any:
    # The name is in the stack that is printed at the deadline.
    if launcher.size()[1] < 2 or "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        return MPI
    faulthandler.dump_traceback_later(timeout, exit=True, file=_STDERR)
    try:
        from mpi4py import MPI
    finally:
        faulthandler.cancel_dump_traceback_later()
    return MPI


@contextlib.contextmanager
def importing(module: str, timeout: float | None = None) -> Iterator[None]:
    """Context of a slow import, before which MPI is initialised: ranks that wait find what this one does.

    For programs whose ranks are those of one world.

    Parameters
    ----------
    module
        Name of the module.
    timeout
        As for `World`.
    """
    MPI = initialize(environment.read("HPCSGD_TIMEOUT") if timeout is None else timeout)
    if MPI.COMM_WORLD.size > 1:
        shutdown.abort_on_uncaught_exception()
    with phase(f"importing {module}"):
        yield


def at_start() -> contextlib.AbstractContextManager[None]:
    """Context of the first operations of a world: other ranks find that this one has reached them."""
    return phase(_PHASE)


def meet(comm: Any, timeout: float) -> tuple[Any, list[tuple[int, str]]]:
    """Return a duplicate of an mpi4py communicator, and the number in the job and the host of each rank.

    Collective: the first operations of a world.

    Raises
    ------
    DeadlineExceeded
        After `timeout` seconds: a rank has not reached them.
    """
    from mpi4py import MPI

    waiter, arrivals = DeadlineWaiter(comm.rank, timeout), Arrivals(comm, timeout)
    waiter.hooks = WaitHooks(explain=arrivals.explain, warn=arrivals.warn)
    private, request = comm.Idup()
    waiter.until(request.Test, _OPERATION, arrivals.missing)
    everyone = Communicator(private, range(comm.size), waiter, Traffic())
    return private, everyone.gather_objects((MPI.COMM_WORLD.rank, socket.gethostname()), _OPERATION)


class Arrivals:
    """The ranks that have reached the start of a world, as far as they are on this machine.

    No message shows it yet, but each process has a record that others of its machine can read.

    Parameters
    ----------
    comm
        An mpi4py communicator of the world's ranks.
    timeout
        Seconds until a wait fails.
    """

    def __init__(self, comm: Any, timeout: float) -> None:
        from mpi4py import MPI

        group = comm.Get_group()
        numbers = group.Translate_ranks(list(range(group.size)), MPI.COMM_WORLD.Get_group())
        #: By number in the job, the rank in the world.
        self._ranks = {number: rank for rank, number in enumerate(numbers)}
        self._rank, self._size, self._timeout = comm.rank, comm.size, timeout
        self._killed = procfs.killed_for_memory()

    def missing(self) -> list[int]:
        """Return the ranks of this machine that have not arrived."""
        return [rank for rank, (_, view) in self._processes().items() if not _has_arrived(view)]

    def explain(self, seconds: float) -> tuple[str, bool]:
        """Return the states of the missing ranks, and whether another rank of this machine prints them."""
        lines, is_first = self._report(stacks=True)
        return ("\n" + " " * 12).join(lines), not is_first

    def warn(self, seconds: float) -> bool:
        """Print a warning, on one rank of each machine, that some have not arrived."""
        lines, is_first = self._report(stacks=False)
        if is_first and (self.missing() or self._rank == 0):
            limit = f"after {self._timeout:g} s (--timeout, HPCSGD_TIMEOUT) the job ends"
            begin = f"hpcsgd: {seconds:.0f} s in {_OPERATION}; {limit}:"
            print("\n  ".join([begin, *lines]), file=sys.stderr, flush=True)
        return True

    def _processes(self) -> dict[int, tuple[int, ProcessView | None]]:
        """The process of each rank of this machine, and its record, if it has one."""
        found = {}
        for number, pids in launcher.local_processes().items():
            if number in self._ranks:
                views = {pid: view for pid in pids if (view := _view(pid)) is not None}
                # Not a shell around it, nor a worker of its data loader, which shares its record.
                pid = min(views, default=pids[-1])
                found[self._ranks[number]] = pid, views.get(pid)
        return dict(sorted(found.items()))

    def _report(self, *, stacks: bool) -> tuple[list[str], bool]:
        """Lines, and whether this is the first rank of its machine that has arrived."""
        processes, host = self._processes(), socket.gethostname()
        arrived = [rank for rank, (_, view) in processes.items() if _has_arrived(view)]
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
        if elsewhere := self._size - len(processes):
            lines.append(f"nothing is known here of {elsewhere} ranks on other machines")
        return lines, arrived[0] == self._rank


def _view(pid: int) -> ProcessView | None:
    info = ProcessInfo.find(pid)
    with contextlib.suppress(OSError):
        return None if info is None else ProcessView(info)
    return None


def _has_arrived(view: ProcessView | None) -> bool:
    return view is not None and (view.info.pid == os.getpid() or view.last().phase == _PHASE)


def _place(view: ProcessView | None) -> str:
    if view is None:
        return "has not begun: it has made no Run and no World"
    last = view.last()
    if last.phase:
        return f"is {last.phase}, for {last.ago:.0f} s"
    return f"has not reached it; its last operation: {last.operation or 'none'}"
