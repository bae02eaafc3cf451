"""The start of a world: the first operations, which all ranks must reach."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

from hpcsgd.diagnostics import procfs
from hpcsgd.diagnostics.activity import phase
from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.mpi import launcher, shutdown
from hpcsgd.mpi.arrivals import Arrivals
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.waiting import DeadlineWaiter, WaitHooks, deadline_error

_STDERR = 2
_MPI, _WORLD = "MPI", "hpcsgd.World"
_LOOK_INTERVAL = 2.0  # seconds, between two looks at the processes of this machine
_REPORT_DELAY = 6.0  # seconds, for the child of another rank to print its report


def initialize(timeout: float) -> Any:
    """Return `mpi4py.MPI`, which initialises MPI unless the program has: that waits for all ranks.

    The job ends after `timeout` seconds in which ranks are missing.
    """
    module = sys.modules.get("mpi4py.MPI")
    if launcher.size()[1] < 2 or (module is not None and module.Is_initialized()):
        return _initialized()
    with phase(Arrivals.phase_of(_MPI)), _watched(timeout):
        return _initialized()


def _initialized() -> Any:
    from mpi4py import MPI

    if not MPI.Is_initialized():  # by mpi4py: the program has set mpi4py.rc.initialize to False
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
        shutdown.finalize_at_exit()
    return MPI


@contextlib.contextmanager
def _watched(timeout: float) -> Iterator[None]:
    """Context of a wait in native code that holds Python's lock, so that no thread can look at the time.

    A child of this process does: at the deadline it reports the missing ranks, and kills this process, and
    with it the job.
    """
    parent, (done, end) = os.getpid(), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child needs none of their locks
        watcher = os.fork()
    if watcher == 0:
        os.close(end)
        _watch(parent, done, timeout)
    os.close(done)
    try:
        yield
    finally:
        os.close(end)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(watcher, 0)


def _watch(parent: int, done: int, timeout: float) -> NoReturn:
    """Do the child's part, until `done` can be read."""
    try:
        if _report_missing(done, timeout) and os.getppid() == parent:
            shutdown.unlink_mpich_segments(parent)
            os.kill(parent, signal.SIGKILL)
    finally:
        os._exit(0)


def _report_missing(done: int, timeout: float) -> bool:
    """Report the missing ranks at the timeout, or when one has ended; False if `done` can be read before."""
    rank, waiter = launcher.rank(), DeadlineWaiter(launcher.rank(), timeout)
    arrivals = Arrivals(_MPI, range(launcher.size()[1]), rank, timeout)
    warn_at, looked_at = min(waiter.warn_after, timeout), time.monotonic()
    waited, ended = 0.0, False
    while waited < timeout and not ended:
        if select.select([done], [], [], min(_LOOK_INTERVAL, timeout - waited))[0]:
            return False
        now = time.monotonic()
        if procfs.can_run(os.getppid()):  # a rank that is stopped is reported by the others
            waited += now - looked_at
        looked_at = now
        if warn_at <= waited < timeout:
            warn_at = timeout
            arrivals.warn(waited)
        ended = arrivals.look()
    report, _, elsewhere = arrivals.explain(waited)
    if elsewhere and select.select([done], [], [], _REPORT_DELAY)[0]:
        return False
    error = deadline_error(rank, round(waited), arrivals.missing(), arrivals.operation, report)
    text = f"hpcsgd: rank {rank} ends the job:\n{type(error).__module__}.{type(error).__name__}: {error}\n"
    os.write(_STDERR, text.encode())
    return True


def at_start() -> contextlib.AbstractContextManager[None]:
    """Context of the first operations of a world: other ranks find that this one has reached them."""
    return phase(Arrivals.phase_of(_WORLD))


def meet(comm: Any, timeout: float) -> tuple[Any, list[tuple[int, str]]]:
    """Return a duplicate of an mpi4py communicator, and the number in the job and the host of each rank.

    Collective: the first operations of a world.

    Raises
    ------
    DeadlineExceeded
        After `timeout` seconds: a rank has not reached them.
    """
    from mpi4py import MPI

    group, job = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    numbers = group.Translate_ranks(list(range(group.size)), job)
    waiter, arrivals = DeadlineWaiter(comm.rank, timeout), Arrivals(_WORLD, numbers, comm.rank, timeout)
    waiter.hooks = WaitHooks(explain=arrivals.explain, warn=arrivals.warn)
    private, request = comm.Idup()
    waiter.until(request.Test, arrivals.operation, arrivals.missing)
    everyone = Communicator(private, range(comm.size), waiter, Traffic())
    here = MPI.COMM_WORLD.rank, socket.gethostname()
    return private, everyone.gather_objects(here, arrivals.operation)
