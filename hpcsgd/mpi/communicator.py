"""MPI calls on one communicator: polled, so that waiting yields and ends, and counted in bytes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count, pairwise
from typing import Any

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.mpi.waiting import Waiter

Buffer = Any  # a NumPy array, or a device tensor where MPI is CUDA-aware


class Transport:
    """One communicator, used by one thread at a time.

    Parameters
    ----------
    comm
        An mpi4py communicator that belongs to hpcsgd.
    ranks
        For each of its ranks the rank in the world, for errors.
    waiter, traffic
        How to wait, and where to count.
    """

    def __init__(self, comm: Any, ranks: Sequence[int], waiter: Waiter, traffic: Traffic) -> None:
        self.comm = comm
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.ranks = list(ranks)
        self._waiter = waiter
        self._traffic = traffic
        self._twins: list[Transport] = []
        #: A number for each who shares the communicator and must tell its messages from the others'.
        self.users = count()
        #: Called while a wait goes on; does a little work and says whether there was any.
        self.meanwhile: Callable[[], bool] | None = None

    def twin(self, index: int) -> Transport:
        """The same ranks on a communicator of their own, whose messages match apart from all others.

        Collective where twin `index` is asked for the first time; the communicators last until `free_twins`.
        """
        while len(self._twins) <= index:
            self._twins.append(Transport(self.comm.Dup(), self.ranks, self._waiter, self._traffic))
        return self._twins[index]

    def free_twins(self) -> None:
        """Free the communicators of the twins; collective."""
        for twin in self._twins:
            twin.comm.Free()
        self._twins.clear()

    @property
    def tag_limit(self) -> int:
        """Tags are below this."""
        from mpi4py import MPI

        # An attribute of that communicator alone, in Open MPI.
        highest: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
        return int(highest) + 1

    def isend(self, buffer: Buffer, dest: int, tag: int = 0) -> Any:
        """Start to send; the buffer must stay unchanged until the request is complete."""
        self._traffic.sent += buffer.nbytes
        return self.comm.Isend(_bytes(buffer), dest, tag)

    def irecv(self, buffer: Buffer, source: int, tag: int = 0) -> Any:
        """Start to receive exactly `buffer.nbytes` bytes."""
        return self.comm.Irecv(_bytes(buffer), source, tag)

    def wait(self, request: Any, what: str, peer: int | None = None) -> None:
        """Wait for one request; `peer` is who it depends on."""
        missing = None if peer is None else lambda: [self.ranks[peer]]
        self._waiter.until(partial(self._test, request), what, missing)

    def _test(self, request: Any) -> bool:
        while not request.Test():
            if self.meanwhile is None or not self.meanwhile():
                return False
        return True

    def allreduce(self, buffer: Buffer, what: str, op: str = "SUM") -> None:
        """Reduce in place by the library's own all-reduce; `op` is the name of an MPI operation."""
        self.wait(self.iallreduce(buffer, op), what)

    def iallreduce(self, buffer: Buffer, op: str) -> Any:
        """Start to reduce in place; the request is complete when the result is there."""
        from mpi4py import MPI

        self._count_allreduce(buffer)
        return self.comm.Iallreduce(MPI.IN_PLACE, buffer, getattr(MPI, op))

    def iallgather(self, mine: Buffer, everything: Buffer) -> Any:
        """Start to gather rows of equal size; this rank's goes to all others."""
        self._traffic.sent += (self.size - 1) * mine.nbytes
        return self.comm.Iallgather(_bytes(mine), _bytes(everything))

    def allreduce_on_device(self, tensor: Buffer) -> None:
        """Sum a device tensor in place by one blocking call."""
        from mpi4py import MPI

        self._count_allreduce(tensor)
        self.comm.Allreduce(MPI.IN_PLACE, tensor)

    def _count_allreduce(self, buffer: Buffer) -> None:
        self._traffic.sent += 2 * (self.size - 1) * int(buffer.nbytes) // self.size

    def broadcast(self, buffer: Buffer, root: int, what: str) -> None:
        """Overwrite the buffer with that of `root`."""
        if self.rank == root:
            self._traffic.sent += buffer.nbytes
        self.wait(self.comm.Ibcast(_bytes(buffer), root), what, root)

    def barrier(self, what: str) -> None:
        """Wait until all ranks are here."""
        self.wait(self.comm.Ibarrier(), what)

    def gather_objects(self, value: object, what: str) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self.wait(self.comm.Iallgather(np.array([mine.size], np.int64), sizes), what)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        everything = np.empty(starts[-1], np.uint8)
        request = self.comm.Iallgatherv(mine, [everything, sizes, starts[:-1], _mpi_byte()])
        self.wait(request, what)
        self._traffic.sent += mine.nbytes
        return [pickle.loads(everything[a:b].tobytes()) for a, b in pairwise(starts)]


def _mpi_byte() -> Any:
    from mpi4py import MPI

    return MPI.BYTE


def _bytes(buffer: Buffer) -> Any:
    # As bytes every dtype travels, those MPI has no name for (bfloat16) too.
    return buffer.view(np.uint8) if isinstance(buffer, np.ndarray) else buffer
