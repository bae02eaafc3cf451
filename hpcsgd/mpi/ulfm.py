"""Failed ranks: detected, and excluded from the job, where MPI supports it.

That is User-Level Failure Mitigation (ULFM), which Open MPI has since version 5 and enables when the job is
started with `mpiexec --with-ft ulfm`. Any other MPI ends all ranks of the job when one dies.
"""

from __future__ import annotations

import os
import time
from typing import Any

from hpcsgd.errors import RankFailed

_ENABLED = "OMPI_MCA_mpi_ft_enable"  # set by Open MPI's mpiexec for --with-ft
_DETECTION_DELAY = 2.0  # seconds until a failure is known on all ranks
_ERROR_CLASSES = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")


def is_enabled() -> bool:
    """Return whether this job continues when a rank dies."""
    return os.environ.get(_ENABLED, "0").lower() not in ("", "0", "false", "no")


def is_rank_failure(error: BaseException) -> bool:
    """Return whether an error reports failed ranks."""
    from mpi4py import MPI

    if isinstance(error, MPI.Exception):
        return error.Get_error_class() in [getattr(MPI, name, None) for name in _ERROR_CLASSES]
    return isinstance(error, RankFailed)


def lowest_alive_rank() -> int:
    """Return the lowest rank of the job that has not failed."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    failed = world.Get_failed()
    dead = failed.Translate_ranks(list(range(failed.size)), world.Get_group())
    return min(set(range(world.size)) - set(dead))


class FailureDetector:
    """Detects failed ranks of a communicator with `MPI.ERRORS_RETURN`; without ULFM it does nothing."""

    def __init__(self, comm: Any, hosts: list[str]) -> None:
        self._comm, self._hosts = comm, hosts
        self._enabled = is_enabled() and comm.size > 1

    def check(self) -> None:
        """Raise `RankFailed` if a rank has died, or another rank has revoked the communicator for that."""
        if self._enabled and (self._comm.Is_revoked() or self._comm.Get_failed().size):
            raise RankFailed("a rank of this job has died")

    def caused(self, error: BaseException) -> bool:
        """Return whether failed ranks caused an error, which MPI may report as another one, and earlier."""
        if is_rank_failure(error) or not self._enabled:
            return is_rank_failure(error)
        from mpi4py import MPI

        deadline = time.monotonic() + _DETECTION_DELAY
        while isinstance(error, MPI.Exception) and time.monotonic() < deadline:
            try:
                self.check()
            except RankFailed:
                return True
            time.sleep(_DETECTION_DELAY / 100)
        return False

    def shrink(self) -> tuple[Any, list[str], RankFailed]:
        """Return a communicator of the survivors, their hosts, and an error that names the failed ranks.

        Collective over the survivors.
        """
        from mpi4py import MPI

        self._comm.Revoke()
        survivors = self._comm.Shrink()
        survivors.Set_errhandler(MPI.ERRORS_RETURN)
        before, now = self._comm.Get_group(), survivors.Get_group()
        failed = MPI.Group.Difference(before, now)
        ranks = failed.Translate_ranks(list(range(failed.size)), before)
        hosts = ", ".join(sorted({self._hosts[rank] for rank in ranks}))
        alive = [host for rank, host in enumerate(self._hosts) if rank not in ranks]
        error = RankFailed(
            f"died, on {hosts}" if ranks else "a connection broke, but no rank has died",
            rank=ranks if len(ranks) else None,
            expected=f"{before.size} ranks",
            got=f"{now.size}",
            do="look for the reason in the log of that host: out of memory, preempted, hardware",
            everywhere=True,
        )
        return survivors, alive, error
