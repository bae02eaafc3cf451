"""IPython, where an exception ends a cell or a script but not the process, so that `sys.excepthook` is not
called."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from hpcsgd.mpi.runtime import Runtime

_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()
_MARK = "_hpcsgd_showtraceback"


def watch(runtime: Runtime) -> None:
    """Act on uncaught exceptions where this process runs IPython; to be called when a world starts.

    In a terminal, as of `mpiexec -n 2 ipython script.py`, they end the job, as those of a Python script do.
    In a kernel, as of ipyparallel's engines, the caller gets the exception; other ranks that wait for it
    get an error, until its next cell begins.
    """
    _runtimes.add(runtime)
    shell = _shell()
    if shell is None or hasattr(shell, _MARK):
        return
    show = shell.showtraceback
    setattr(shell, _MARK, show)
    in_kernel = hasattr(shell, "kernel")

    def showtraceback(exc_tuple: Any = None, *arguments: Any, **options: Any) -> None:
        raised: Any = exc_tuple or sys.exc_info()
        if isinstance(raised[1], Exception) and in_kernel:
            _interrupt(raised[1])
        elif isinstance(raised[1], Exception) and _open():
            sys.excepthook(*raised)  # prints it once for all ranks, and ends the job
        show(exc_tuple, *arguments, **options)

    shell.showtraceback = showtraceback
    if in_kernel:
        shell.events.register("pre_execute", _resume)
        _resume_before(shell.kernel, "do_apply")  # functions that ipyparallel calls are no cells


def _resume_before(kernel: Any, name: str) -> None:
    call = getattr(kernel, name, None)
    if call is None:
        return

    def resume_and_call(*arguments: Any, **options: Any) -> Any:
        _resume()
        return call(*arguments, **options)

    setattr(kernel, name, resume_and_call)


def _shell() -> Any:
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def _open() -> list[Runtime]:
    return [runtime for runtime in _runtimes if runtime.is_open]


def _interrupt(error: Exception) -> None:
    for runtime in _open():
        runtime.departure.interrupt(f"is interrupted by {type(error).__name__}: {error}"[:200])


def _resume(*_: object) -> None:
    for runtime in _open():
        runtime.departure.interrupt("")
