"""The ranks as far as MPI brings them together, and how one talks to another within a deadline."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import DeadlineExceeded
from hpcsgd.mpi import launcher
from hpcsgd.mpi.communicator import Transport
from hpcsgd.mpi.waiting import Waiter

DEADLINE = 10.0  # seconds that a check waits for other ranks
_TESTS_BEFORE_A_YIELD = 1000
_FACTS = 1


class Job:
    """What checks need of the other ranks. Where MPI cannot start, this process alone.

    Parameters
    ----------
    out
        The folder that runs go to.
    patience
        Seconds that rank 0 waits for the facts of all ranks.

    Attributes
    ----------
    problem
        Why there is no MPI; "" where there is.
    speaks
        Whether this process prints. Ranks that MPI does not bring together take the launcher's word for
        which of them is the first.
    all, node
        The ranks of the job and of this node, for the current check; None for one alone.
    nodes
        The members of each node.
    """

    def __init__(self, out: Path, patience: float) -> None:
        self.out = out
        self.patience = patience
        self.mpi, self.problem = start_mpi()
        world = self.mpi.COMM_WORLD if self.mpi is not None else None
        self.rank: int = world.rank if world is not None else 0
        self.size: int = world.size if world is not None else 1
        self.speaks = self.rank == 0 if self.size > 1 else launcher.rank() == 0
        self.nodes = [[0]]
        self.all: Transport | None = None
        self.node: Transport | None = None
        self._waiter = Waiter(self.rank, DEADLINE)
        self._sent: list[Any] = []
        if self.size > 1:
            self._reports = self._duplicate(world)
            self._across = Waiter(self.rank, patience)
            node = self._reports.Split_type(self.mpi.COMM_TYPE_SHARED, self.rank)
            members = node.allgather(self.rank)
            self.nodes = [list(m) for m in sorted(set(self._reports.allgather(tuple(members))))]
            self.node = Transport(node, members, self._waiter, Traffic())

    @property
    def members(self) -> list[int]:
        """The ranks of this node."""
        return next(node for node in self.nodes if self.rank in node)

    @property
    def leader(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.members[0] == self.rank

    def next_check(self) -> None:
        """Give the next check a communicator of its own: what a failed one left must not reach it."""
        if self.size > 1:
            comm = self._duplicate(self._reports)
            self.all = Transport(comm, range(self.size), self._waiter, Traffic())

    def report(self, facts: object) -> dict[int, Any]:
        """What every rank found; on rank 0, which need not have an answer from all."""
        if self.size == 1:
            return {0: facts}
        if self.rank != 0:
            self._sent.append(self._reports.isend(facts, 0, _FACTS))
            return {}
        found: dict[int, Any] = {0: facts}

        def complete() -> bool:
            status = self.mpi.Status()
            while len(found) < self.size and self._reports.Iprobe(tag=_FACTS, status=status):
                found[status.Get_source()] = self._reports.recv(source=status.Get_source(), tag=_FACTS)
            return len(found) == self.size

        with contextlib.suppress(DeadlineExceeded):
            self._across.until(complete, "the facts of all ranks")
        return found

    def same(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return value if self.all is None else self.all.gather_objects(value, "rank 0")[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.all is not None:
            self.all.barrier("the other ranks")

    def send(self, buffer: np.ndarray, to: int) -> None:
        """Send at once; for what is timed, so without sleep."""
        assert self.all is not None
        self._spin(self.all.isend(buffer, to))

    def receive(self, buffer: np.ndarray, source: int) -> None:
        """Receive `buffer.nbytes` bytes; without sleep."""
        assert self.all is not None
        self._spin(self.all.irecv(buffer, source))

    def _spin(self, request: Any) -> None:
        give_up = time.monotonic() + DEADLINE
        tests = 0
        while not request.Test():
            tests += 1
            if tests > _TESTS_BEFORE_A_YIELD:
                # Who is waited for may need this very core.
                os.sched_yield()
                if time.monotonic() > give_up:
                    raise DeadlineExceeded(f"waited {DEADLINE:g} s for a message", rank=self.rank)

    def _duplicate(self, comm: Any) -> Any:
        duplicate, request = comm.Idup()
        Waiter(self.rank, self.patience + DEADLINE).until(request.Test, "a duplicate of the communicator")
        return duplicate


def start_mpi() -> tuple[Any, str]:
    """mpi4py's MPI, initialised; or None, and why it cannot be.

    The library is asked for its name before it starts: MPICH ends a process that Open MPI's mpiexec started.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return None, " ".join(str(error).split())
    if not MPI.Is_initialized():
        library = MPI.Get_library_version()
        if "MPICH" in library and launcher.starts_only_open_mpi():
            return None, "MPICH does not start under Open MPI's mpiexec"
        with warnings.catch_warnings():
            # Of a launcher that does not fit, which the page says once and not once a rank.
            warnings.simplefilter("ignore", RuntimeWarning)
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI, ""
