"""MPI calls on one communicator: polled, so that waits yield and have a deadline, and counted in bytes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import large_messages
from hpcsgd.mpi.large_messages import Parts, as_bytes
from hpcsgd.mpi.outstanding import Outstanding
from hpcsgd.mpi.tasks import Wait
from hpcsgd.mpi.waiting import DeadlineWaiter

Buffer = Any  # a NumPy array, or a device tensor where MPI is CUDA-aware


class Communicator:
    """An MPI communicator with deadlines and counted bytes, for use by one thread at a time.

    Parameters
    ----------
    comm
        An mpi4py communicator that belongs to hpcsgd.
    ranks
        The global rank of each of its ranks, for errors.
    waiter
        Waits with a deadline.
    traffic
        Counts the bytes.

    Attributes
    ----------
    outstanding
        Its receives and collectives that may not have ended.
    """

    def __init__(self, comm: Any, ranks: Sequence[int], waiter: DeadlineWaiter, traffic: Traffic) -> None:
        self.comm = comm
        self.rank: int = comm.rank
        self.size: int = comm.size
        self.ranks = list(ranks)
        self._waiter = waiter
        self._traffic = traffic
        self.outstanding = Outstanding()
        self._duplicates: dict[str, Communicator] = {}
        self._ids = count()
        self._thread: int | None = None

    def next_id(self) -> int:
        """Return 0, 1, 2 … at successive calls; each user of the communicator derives its own tags from one.

        All ranks must call it in the same order.
        """
        return next(self._ids)

    def dup(self, purpose: str) -> Communicator:
        """Return the duplicate for a purpose: the same ranks, whose messages match only each other.

        Collective at the first call for a purpose; later calls return the same communicator, until
        `free_duplicates`.
        """
        if purpose not in self._duplicates:
            self.barrier(f"a duplicate of the communicator for {purpose}")  # MPI's own wait has no deadline
            comm = self.comm.Dup()
            self._duplicates[purpose] = Communicator(comm, self.ranks, self._waiter, self._traffic)
        return self._duplicates[purpose]

    def duplicates(self) -> list[Communicator]:
        """Return all duplicates, and theirs, in the order of their creation."""
        return [d for each in self._duplicates.values() for d in (each, *each.duplicates())]

    def free_duplicates(self) -> None:
        """Free all duplicates; collective."""
        for duplicate in self._duplicates.values():
            duplicate.free_duplicates()
            duplicate.comm.Free()
        self._duplicates.clear()

    @property
    def tag_limit(self) -> int:
        """The number of valid tags: 0 to `tag_limit - 1`."""
        from mpi4py import MPI

        # In Open MPI only that communicator has the attribute.
        highest: Any = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
        return int(highest) + 1

    def isend(self, buffer: Buffer, dest: int, tag: int = 0) -> Any:
        """Start to send a buffer, which must not change until the request is complete."""
        self._traffic.count(sent=buffer.nbytes)
        return large_messages.begin(lambda part: self.comm.Isend(part, dest, tag), buffer)

    def irecv(self, buffer: Buffer, source: int, tag: int = 0) -> Any:
        """Start to receive exactly `buffer.nbytes` bytes."""
        return self.outstanding.receive(
            large_messages.begin(lambda part: self.comm.Irecv(part, source, tag), buffer)
        )

    def wait(self, request: Any, operation: str, peer: int | None = None) -> None:
        """Wait for a request; `peer` is the rank of this communicator that it depends on, if one."""
        self._waiter.until_end_of(self.completion(request, peer), operation)

    def completion(self, request: Any, peer: int | None = None) -> Wait:
        """Return the wait of a task for a request, see `wait`."""
        return Wait(request.Test, None if peer is None else lambda: [self.ranks[peer]])

    def allreduce(self, buffer: Buffer, operation: str, op: str = "SUM") -> None:
        """Reduce in place with MPI's own all-reduce; `op` is the name of an MPI operation."""
        self.wait(self.iallreduce(buffer, op), operation)

    def iallreduce(self, buffer: Buffer, op: str) -> Any:
        """Start to reduce in place."""
        self._count_allreduce(buffer)
        if buffer.nbytes <= large_messages.LARGEST:
            return self._iallreduce(buffer, op)
        return Parts([self._iallreduce(part, op) for part in large_messages.parts(buffer)])

    def _iallreduce(self, buffer: Buffer, op: str) -> Any:
        from mpi4py import MPI

        request = self.comm.Iallreduce(MPI.IN_PLACE, buffer, getattr(MPI, op))
        return self.outstanding.collective(request, "allreduce", buffer.size, buffer.dtype, op)

    def iallgather(self, row: Buffer, rows: Buffer) -> Any:
        """Start to gather the equally sized rows of all ranks."""
        self._traffic.count(sent=(self.size - 1) * row.nbytes)
        if rows.nbytes > large_messages.LARGEST:
            return self._iallgather_large(row, np.split(as_bytes(rows).reshape(-1), self.size))
        request = self.comm.Iallgather(as_bytes(row), as_bytes(rows))
        return self.outstanding.collective(request, "allgather", row.nbytes)

    def _iallgather_large(self, row: np.ndarray, rows: Sequence[np.ndarray]) -> Parts:
        """Gather by a broadcast of every row, whose sizes may differ."""
        rows[self.rank][:] = as_bytes(row).reshape(-1)
        return Parts([self._ibroadcast(target, root) for root, target in enumerate(rows) if target.size])

    def _ibroadcast(self, buffer: Buffer, root: int) -> Any:
        def start(part: Any) -> Any:
            request = self.comm.Ibcast(part, root)
            return self.outstanding.collective(request, "broadcast", part.nbytes, root)

        return large_messages.begin(start, buffer)

    def allreduce_on_device(self, tensor: Buffer) -> None:
        """Sum a device tensor in place by blocking calls of a CUDA-aware MPI."""
        from mpi4py import MPI

        self._count_allreduce(tensor)
        for part in large_messages.parts(tensor):
            self.comm.Allreduce(MPI.IN_PLACE, part)

    def _count_allreduce(self, buffer: Buffer) -> None:
        self._traffic.count(sent=2 * (self.size - 1) * int(buffer.nbytes) // self.size)

    def ibroadcast(self, buffer: Buffer, root: int) -> Any:
        """Start to overwrite the buffer with that of `root`."""
        if self.rank == root:
            self._traffic.count(sent=buffer.nbytes)
        return self._ibroadcast(buffer, root)

    def barrier(self, operation: str) -> None:
        """Wait until all ranks have called this."""
        self.wait(self.outstanding.collective(self.comm.Ibarrier(), "barrier"), operation)

    def gather_objects(self, value: object, operation: str) -> list[Any]:
        """Return the picklable values of all ranks, in rank order, on every rank."""
        with self._of_one_thread(operation):
            return self._gather_objects(value, operation)

    @contextmanager
    def _of_one_thread(self, operation: str) -> Iterator[None]:
        """Context in which another thread gets an error, in place of parts of the messages of this one."""
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            raise HpcsgdError(
                f"{operation}: another thread of this rank is in such a call",
                rank=self.ranks[self.rank],
                do="call run.step(), iterate over run.batches() and gather in one thread; fetch ahead by the "
                "workers of a DataLoader, num_workers=...",
            )
        self._thread = thread
        try:
            yield
        finally:
            self._thread = None

    def _gather_objects(self, value: object, operation: str) -> list[Any]:
        pickled = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        request = self.comm.Iallgather(np.array([pickled.size], np.int64), sizes)
        self.wait(self.outstanding.collective(request, "allgather", sizes.itemsize), operation)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        received = np.empty(starts[-1], np.uint8)
        self.wait(self._iallgatherv(pickled, received, sizes, starts[:-1]), operation)
        self._traffic.count(sent=pickled.nbytes)
        return [pickle.loads(received[a:b].tobytes()) for a, b in pairwise(starts)]

    def _iallgatherv(
        self, own: np.ndarray, received: np.ndarray, sizes: np.ndarray, starts: np.ndarray
    ) -> Any:
        from mpi4py import MPI

        if received.nbytes > large_messages.LARGEST:
            return self._iallgather_large(own, np.split(received, starts[1:]))
        request = self.comm.Iallgatherv(own, [received, sizes, starts, MPI.BYTE])
        return self.outstanding.collective(request, "allgatherv", sizes)
