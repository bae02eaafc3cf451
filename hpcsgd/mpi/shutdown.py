"""How a rank ends: what is in flight comes to its end, and what cannot go on takes the job with it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
import traceback
import weakref
from types import TracebackType
from typing import NoReturn

from hpcsgd.diagnostics.trace import Off
from hpcsgd.mpi import launcher, ulfm
from hpcsgd.mpi.progress import Progress

_DRAIN_AT_EXIT = 30.0  # seconds
_LAST_WORDS = 0.2  # seconds for the launcher to read what was printed, before Abort kills it too
_FIRST_WORD = 3.0  # seconds that rank 0 has to print an error that all ranks raise
_FAREWELL = 1.0  # seconds in which the others finish what they began with this rank
_OTHERS_WORD = 6.0  # seconds that another rank has to ask all others and print what it has learnt

_left_behind: list[bool] = []
_running: weakref.WeakSet[Progress] = weakref.WeakSet()
_traced: weakref.WeakSet[Off] = weakref.WeakSet()


def drain_at_exit(progress: Progress) -> None:
    """Let the communication that is outstanding when the program ends come to its end, within bounds.

    What all ranks started is finished; what some rank never joins must not keep the job for ever.
    """
    _running.add(progress)


def flush_at_exit(trace: Off) -> None:
    """Let what is traced reach its file, however this rank ends; but for a signal that kills it."""
    _traced.add(trace)


@atexit.register
def _flush() -> None:
    for trace in list(_traced):
        trace.flush()


@atexit.register
def _drain() -> None:
    for progress in list(_running):
        try:
            progress.stop(min(_DRAIN_AT_EXIT, progress.waiter.timeout))
        except BaseException as error:
            print(f"hpcsgd: at exit: {error}", file=sys.stderr, flush=True)
            abort()


def abort() -> None:
    """End all ranks of the job, after what was printed has been read."""
    from mpi4py import MPI

    _flush()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_LAST_WORDS)
    MPI.COMM_WORLD.Abort(1)


def leave(code: int) -> NoReturn:
    """Exit; without a last meeting in MPI_Finalize where some ranks are not there any more."""
    if not _left_behind:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_FAREWELL)  # who exits first must not look like one more that has died
    os._exit(code)


def speaks() -> bool:
    """Whether it is for this rank to say what all have come to know."""
    return launcher.rank() == (ulfm.lowest() if _left_behind else 0)


def leave_behind() -> None:
    """Note that some ranks have died, and that the others have gone on."""
    _left_behind.append(True)


def is_complete() -> bool:
    """Whether all ranks of the job are still there."""
    return not _left_behind


def end_all_ranks_on_an_exception() -> None:
    """Let an uncaught exception on one rank end the job, with its traceback printed once."""
    if getattr(sys.excepthook, "_hpcsgd", False):
        return
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        from mpi4py import MPI

        if MPI.Is_finalized():
            previous(kind, error, where)
            return
        rank = MPI.COMM_WORLD.rank
        if getattr(error, "elsewhere", False):
            time.sleep(_OTHERS_WORD)
        lost = ulfm.told_by(error)
        if lost and rank != ulfm.lowest():
            time.sleep(_FIRST_WORD)
        elif lost:
            print(f"hpcsgd: rank {rank}: another rank of this job has died", file=sys.stderr)
        elif getattr(error, "everywhere", False) and rank != 0:
            # Rank 0 prints the same error and ends the job; this is for the case that it cannot.
            time.sleep(_FIRST_WORD)
        elif issubclass(kind, KeyboardInterrupt):
            print(f"hpcsgd: rank {rank} interrupted", file=sys.stderr)
        else:
            with contextlib.suppress(Exception):
                print(f"hpcsgd: rank {rank} ends the job:", file=sys.stderr)
                traceback.print_exception(kind, error, where)
        abort()

    hook._hpcsgd = True  # type: ignore[attr-defined]
    sys.excepthook = hook
