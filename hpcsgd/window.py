"""Memory that all ranks of a node can read and write in place."""

from __future__ import annotations

import mmap
import shutil
import warnings
import weakref
from typing import Any

import numpy as np

from hpcsgd.transport import Transport

_PAGE = 4096


class Window:
    """One row of bytes per rank of the node, all of them visible to each of the node's ranks.

    Parameters
    ----------
    rows
        Shape (ranks on this node, bytes), uint8.
    mine
        The index of this rank's row.
    """

    def __init__(self, rows: np.ndarray, mine: int) -> None:
        self.rows = rows
        self.row: np.ndarray = rows[mine]


class Windows:
    """Allocates windows and frees them once nothing on any rank looks into them.

    `MPI_Win_free` is collective and takes the memory away under every tensor that still views it. A
    window is therefore only freed when its rows are garbage on all ranks of the node, which they agree
    on at the next allocation. So no tensor ever dangles, and a program that opens many runs does not
    grow.

    Parameters
    ----------
    node
        The ranks of this node.
    """

    def __init__(self, node: Transport) -> None:
        self._node = node
        self._open: list[tuple[Any, weakref.ref[np.ndarray]]] = []
        self._warned = False

    def allocate(self, nbytes: int) -> Window | None:
        """A zeroed window of `nbytes` a rank; None where shared memory cannot be had.

        Collective over the node; all of its ranks get a window or none does.
        """
        size = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
        if self._node.size == 1:
            # Nobody to share with; and what MPI gives to one rank alone need not begin at a cache line.
            alone = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return Window(np.frombuffer(alone, np.uint8).reshape(1, size), 0)
        self.free_garbage()
        sizes = self._node.gather_objects(size, "the allocation of a shared window")
        size = max(sizes)
        problem = _lack_of_memory(size * self._node.size)
        win = None
        if not any(self._node.gather_objects(problem, "the allocation of a shared window")):
            win, problem = self._try_to_allocate(size)
        problems = self._node.gather_objects(problem, "the allocation of a shared window")
        if any(problems):
            self._warn(next(filter(None, problems)))
            return None
        assert win is not None
        memory = _memory(win, self._node.size * size)
        rows = memory.reshape(self._node.size, size)
        rows[self._node.rank] = 0
        self._open.append((win, weakref.ref(memory)))
        self._node.barrier("the allocation of a shared window")
        return Window(rows, self._node.rank)

    def _try_to_allocate(self, size: int) -> tuple[Any, str]:
        from mpi4py import MPI

        try:
            return MPI.Win.Allocate_shared(size, 1, comm=self._node.comm), ""
        except MPI.Exception as error:
            return None, str(error)

    def free_garbage(self) -> None:
        """Free the windows that no rank looks into any more; collective over the node."""
        dead = [memory() is None for _, memory in self._open]
        everywhere = self._node.gather_objects(dead, "the release of shared windows")
        kept = []
        for (win, memory), *states in zip(self._open, *everywhere, strict=True):
            if all(states):
                win.Free()
            else:
                kept.append((win, memory))
        self._open = kept

    def _warn(self, problem: str) -> None:
        if self._node.rank == 0 and not self._warned:
            warnings.warn(
                f"no shared memory on this node ({problem}): private buffers and MPI's own "
                "all-reduce are used instead, which is slower; give the node a larger /dev/shm",
                RuntimeWarning,
                stacklevel=2,
            )
        self._warned = True


def _lack_of_memory(nbytes: int) -> str:
    # An overcommitted /dev/shm shows itself as SIGBUS in the middle of training, so ask beforehand.
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return ""
    return "" if free >= nbytes else f"/dev/shm has {free >> 20} MiB free of {nbytes >> 20} needed"


def _memory(win: Any, nbytes: int) -> np.ndarray:
    from mpi4py import MPI

    # MPI lays the segments of a shared window out one after the other unless told otherwise. Every view
    # of this array, NumPy's or torch's, keeps this array itself alive: its life tells who still looks.
    first, _ = win.Shared_query(0)
    memory: Any = MPI.memory.fromaddress(first.address, nbytes)
    return np.frombuffer(memory, np.uint8)
