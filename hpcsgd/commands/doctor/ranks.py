"""The ranks that the doctor examines, and communication between them with a deadline."""

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
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.waiting import DeadlineWaiter

DEADLINE = 10.0  # seconds that a check waits for other ranks
_TESTS_BEFORE_A_YIELD = 1000
_FACTS = 1


class ExaminedJob:
    """The ranks of the job, without a `World`. If MPI cannot start, this process alone.

    Attributes
    ----------
    problem
        The reason why MPI cannot start; "" if it has started.
    is_reporting_rank
        Whether this process prints the page: rank 0. Where MPI does not connect the ranks, the rank in the
        launcher's variables counts.
    comm, node_comm
        Communicators of the job, for the current check, and of this node; None with a single rank.
    nodes
        The ranks of each node.
    """

    def __init__(self, out: Path, timeout: float) -> None:
        self.out = out
        self.timeout = timeout  # seconds that rank 0 waits for the facts of all ranks
        self.mpi, self.problem = start_mpi()
        comm_world = self.mpi.COMM_WORLD if self.mpi is not None else None
        self.rank: int = comm_world.rank if comm_world is not None else 0
        self.size: int = comm_world.size if comm_world is not None else 1
        self.is_reporting_rank = self.rank == 0 if self.size > 1 else launcher.rank() == 0
        self.nodes = [[0]]
        self.comm: Communicator | None = None
        self.node_comm: Communicator | None = None
        self._waiter = DeadlineWaiter(self.rank, DEADLINE)
        self._pending_sends: list[Any] = []
        if self.size > 1:
            self._result_comm = self._duplicate(comm_world)
            self._result_waiter = DeadlineWaiter(self.rank, timeout)
            node = self._result_comm.Split_type(self.mpi.COMM_TYPE_SHARED, self.rank)
            members = node.allgather(self.rank)
            self.nodes = [list(m) for m in sorted(set(self._result_comm.allgather(tuple(members))))]
            self.node_comm = Communicator(node, members, self._waiter, Traffic())

    @property
    def members(self) -> list[int]:
        """The ranks of this node."""
        return next(node for node in self.nodes if self.rank in node)

    @property
    def leader(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.members[0] == self.rank

    def renew_communicator(self) -> None:
        """Open a communicator for the next check, which messages of a failed check cannot reach."""
        if self.size > 1:
            comm = self._duplicate(self._result_comm)
            self.comm = Communicator(comm, range(self.size), self._waiter, Traffic())

    def gather_facts(self, facts: object) -> dict[int, Any]:
        """The facts by rank, on rank 0; ranks that do not reply within the timeout are missing."""
        if self.size == 1:
            return {0: facts}
        if self.rank != 0:
            self._pending_sends.append(self._result_comm.isend(facts, 0, _FACTS))
            return {}
        found: dict[int, Any] = {0: facts}

        def complete() -> bool:
            status = self.mpi.Status()
            while len(found) < self.size and self._result_comm.Iprobe(tag=_FACTS, status=status):
                found[status.Get_source()] = self._result_comm.recv(source=status.Get_source(), tag=_FACTS)
            return len(found) == self.size

        with contextlib.suppress(DeadlineExceeded):
            self._result_waiter.until(complete, "the facts of all ranks")
        return found

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return value if self.comm is None else self.comm.gather_objects(value, "rank 0")[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.comm is not None:
            self.comm.barrier("the other ranks")

    def send(self, buffer: np.ndarray, to: int) -> None:
        """Send a message; for timing, so the wait does not sleep."""
        assert self.comm is not None
        self._spin(self.comm.isend(buffer, to))

    def receive(self, buffer: np.ndarray, source: int) -> None:
        """Receive `buffer.nbytes` bytes; the wait does not sleep."""
        assert self.comm is not None
        self._spin(self.comm.irecv(buffer, source))

    def _spin(self, request: Any) -> None:
        deadline = time.monotonic() + DEADLINE
        tests = 0
        while not request.Test():
            tests += 1
            if tests > _TESTS_BEFORE_A_YIELD:
                # The other rank may need this core.
                os.sched_yield()
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"no message within {DEADLINE:g} s", rank=self.rank)

    def _duplicate(self, comm: Any) -> Any:
        duplicate, request = comm.Idup()
        DeadlineWaiter(self.rank, self.timeout + DEADLINE).until(
            request.Test, "a duplicate of the communicator"
        )
        return duplicate


def start_mpi() -> tuple[Any, str]:
    """Initialise MPI. Returns `mpi4py.MPI` and "", or None and the reason why it cannot start.

    The name of the library is read before it starts: MPICH ends a process that Open MPI's mpiexec started.
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
            # A warning about the wrong launcher, which is on the page, would be printed by every rank.
            warnings.simplefilter("ignore", RuntimeWarning)
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
    return MPI, ""
