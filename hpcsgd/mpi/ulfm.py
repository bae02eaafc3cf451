"""Ranks that die: noticed, and left behind, where MPI can go on without them.

That is User-Level Failure Mitigation (ULFM), which Open MPI has since version 5 and offers when it is started
with `mpiexec --with-ft ulfm`. Any other MPI ends all ranks of the job when one dies.
"""

from __future__ import annotations

import os
import time
from typing import Any

from hpcsgd.errors import RankFailed

_ENABLED = "OMPI_MCA_mpi_ft_enable"  # what Open MPI's mpiexec makes of --with-ft
_NEWS = 2.0  # seconds until all have heard that a rank has died
_CLASSES = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED")


def survivable() -> bool:
    """Whether this job goes on when a rank dies."""
    return os.environ.get(_ENABLED, "0").lower() not in ("", "0", "false", "no")


def told_by(error: BaseException) -> bool:
    """Whether an error says that ranks have died."""
    from mpi4py import MPI

    if isinstance(error, MPI.Exception):
        return error.Get_error_class() in [getattr(MPI, name, None) for name in _CLASSES]
    return isinstance(error, RankFailed)


def lowest() -> int:
    """The lowest rank of the job that has not died."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    failed = world.Get_failed()
    dead = failed.Translate_ranks(list(range(failed.size)), world.Get_group())
    return min(set(range(world.size)) - set(dead))


class Watch:
    """Looks after the ranks of a communicator; without ULFM it sees and does nothing.

    Parameters
    ----------
    comm
        Of all ranks; its errors are returned.
    hosts
        Of each of them.
    """

    def __init__(self, comm: Any, hosts: list[str]) -> None:
        self._comm, self._hosts = comm, hosts
        self._awake = survivable() and comm.size > 1

    def look(self) -> None:
        """Raise `RankFailed` if a rank has died, or another one has said so."""
        if self._awake and (self._comm.Is_revoked() or self._comm.Get_failed().size):
            raise RankFailed("a rank of this job has died")

    def explains(self, error: BaseException) -> bool:
        """Whether an error comes from ranks that have died; MPI may say so in other words, and earlier."""
        if told_by(error) or not self._awake:
            return told_by(error)
        from mpi4py import MPI

        give_up = time.monotonic() + _NEWS
        while isinstance(error, MPI.Exception) and time.monotonic() < give_up:
            try:
                self.look()
            except RankFailed:
                return True
            time.sleep(_NEWS / 100)
        return False

    def survivors(self) -> tuple[Any, list[str], RankFailed]:
        """A communicator of those that are left, their hosts, and who is not; collective over them."""
        from mpi4py import MPI

        self._comm.Revoke()
        left = self._comm.Shrink()
        left.Set_errhandler(MPI.ERRORS_RETURN)
        before, now = self._comm.Get_group(), left.Get_group()
        gone = MPI.Group.Difference(before, now)
        ranks = gone.Translate_ranks(list(range(gone.size)), before)
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
        return left, alive, error
