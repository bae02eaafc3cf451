"""Process shutdown: drains outstanding communication, and aborts the job when a rank cannot continue."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import re
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from hpcsgd.diagnostics.activity import end_in_order
from hpcsgd.diagnostics.trace import NullTracer
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import launcher, ulfm

if TYPE_CHECKING:
    from hpcsgd.mpi.runtime import Runtime

# Seconds, all of them.
_DRAIN_TIMEOUT = 30.0
_OUTPUT_DELAY = 0.2  # for the launcher to read the output, before Abort kills the launcher too
_REPORT_DELAY = 3.0  # for rank 0 to print an error that all ranks raise
_EXIT_DELAY = 1.0  # for the other ranks to finish the operations they began with this one
_DIAGNOSIS_DELAY = 6.0  # for another rank to query all ranks and print its diagnosis

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_COMMANDS = _PACKAGE + "commands" + os.sep
_lost_ranks: list[bool] = []
_foreign: list[bool] = []
#: The rank of MPI_COMM_WORLD that prints errors which all ranks of the last world raise.
_reporting_rank = [0]
_finalizes = [False]
_running: weakref.WeakSet[Runtime] = weakref.WeakSet()
_tracers: weakref.WeakSet[NullTracer] = weakref.WeakSet()


def drain_at_exit(runtime: Runtime) -> None:
    """Complete the communication that is outstanding when the program ends, within a time limit.

    Operations that all ranks have started are completed; one that some rank never joins must not block the
    job for ever.
    """
    _running.add(runtime)


def flush_at_exit(tracer: NullTracer) -> None:
    """Write the buffered events of a trace however this rank ends, except by a signal that kills it."""
    _tracers.add(tracer)


def finalize_at_exit() -> None:
    """Finalise MPI when the program ends, which mpi4py does only where it has initialised it."""
    _finalizes[0] = True


@atexit.register
def _finalize() -> None:
    # The first to be registered is the last to be called.
    if _finalizes[0] and not (MPI := sys.modules["mpi4py.MPI"]).Is_finalized():
        MPI.Finalize()


@atexit.register
def _flush() -> None:
    for tracer in list(_tracers):
        tracer.flush()


@atexit.register
def _drain() -> None:
    end_in_order("its program has ended")
    for runtime in list(_running):
        try:
            runtime.end(min(_DRAIN_TIMEOUT, runtime.timeout))
        except BaseException as error:
            print(f"hpcsgd: at exit: {error}", file=sys.stderr, flush=True)
            abort_job()


def abort_job() -> None:
    """End all ranks of the job, after the launcher has read their output."""
    from mpi4py import MPI

    _flush()
    end_in_order("it ends the job")
    unlink_mpich_segments()
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_OUTPUT_DELAY)
    MPI.COMM_WORLD.Abort(1)


def unlink_mpich_segments(pid: int | None = None) -> None:
    """Unlink MPICH's start-up segments of a process, by default this one, once its node has mapped them."""
    with contextlib.suppress(OSError):
        maps = Path(f"/proc/{pid or 'self'}/maps").read_text()
        for segment in set(re.findall(r"/dev/shm/mpich_shm_\w+", maps)):
            os.unlink(segment)


def exit_process(code: int) -> NoReturn:
    """Exit; without MPI_Finalize where ranks have failed, since it would wait for them."""
    if not _lost_ranks:
        sys.exit(code)
    end_in_order(f"exit status {code}")
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_EXIT_DELAY)  # else the first rank to exit would be taken for another failed one
    os._exit(code)


def note_foreign_code() -> None:
    """Let the process of a command end as the interpreter does: code of the user's is imported.

    Its modules may hold open files, or objects with a `__del__`, which count on that.
    """
    _foreign.append(True)


def runs_foreign_code() -> bool:
    """Return whether `note_foreign_code` was called."""
    return bool(_foreign)


def leave_process(code: int) -> NoReturn:
    """End the process of a command as the interpreter does, but without taking its modules apart.

    With torch that takes a second or two on a busy node, in which nothing happens any more. C's exit
    functions run: by one of MPICH's, mpiexec learns that the rank may end; else it loses others' status.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # joins threads, which ends executors
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    # With Python's lock held, so that no other thread meets what the exit functions take apart.
    ctypes.PyDLL(None).exit(code)
    raise AssertionError("exit has returned")


def is_reporting_rank() -> bool:
    """Return whether this rank is the one that prints messages that are the same on all ranks."""
    return launcher.rank() == (ulfm.lowest_alive_rank() if _lost_ranks else 0)


def set_reporting_rank(rank: int) -> None:
    """Set the rank of `MPI.COMM_WORLD` that prints errors which all ranks of a world raise."""
    _reporting_rank[0] = rank


def mark_ranks_lost() -> None:
    """Record that ranks of this job have failed and the others have continued."""
    _lost_ranks.append(True)


def all_ranks_alive() -> bool:
    """Return whether no rank of the job has failed."""
    return not _lost_ranks


def abort_on_uncaught_exception() -> None:
    """Make an uncaught exception on any rank end the job, with its traceback printed once."""
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
            time.sleep(_DIAGNOSIS_DELAY)
        rank_failure = ulfm.is_rank_failure(error)
        if rank_failure and rank != ulfm.lowest_alive_rank():
            time.sleep(_REPORT_DELAY)
        elif rank_failure:
            print(f"hpcsgd: rank {rank}: another rank of this job has died", file=sys.stderr)
        elif getattr(error, "everywhere", False) and rank != _reporting_rank[0]:
            # That rank prints the same error and ends the job; this one aborts only if it cannot.
            time.sleep(_REPORT_DELAY)
        elif issubclass(kind, KeyboardInterrupt):
            print(f"hpcsgd: rank {rank} interrupted", file=sys.stderr)
        else:
            with contextlib.suppress(Exception):
                print(f"hpcsgd: rank {rank} ends the job:", file=sys.stderr)
                print("".join(_format(kind, error, where)), end="", file=sys.stderr)
        abort_job()

    hook._hpcsgd = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _format(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> Iterable[str]:
    """Text of an exception: of ours, which explain themselves, with the frames of the caller's code alone."""
    if not isinstance(error, HpcsgdError) or error.__cause__ is not None:  # its place is of use
        return traceback.format_exception(kind, error, where)
    frames = traceback.extract_tb(where)
    first = next((n for n, frame in enumerate(frames) if frame.filename.startswith(_PACKAGE)), len(frames))
    is_command = first < len(frames) and frames[first].filename.startswith(_COMMANDS)
    lines = [] if is_command else traceback.format_list(frames[:first])
    head = ["Traceback (most recent call last):\n"] if lines else []
    return [*head, *lines, *traceback.format_exception_only(kind, error)]
