"""Memory shared by the ranks of a node."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from hpcsgd.mpi.communicator import Communicator

T = TypeVar("T")
_PAGE = 4096
_SHARED = "/dev/shm"
_OPERATION = "the allocation of shared memory"


class SharedMemory:
    """One row of bytes a rank of the node, each of them readable and writable by all ranks of the node.

    Parameters
    ----------
    rows
        Shape (ranks on this node, bytes), uint8.
    index
        The row of this rank.
    """

    def __init__(self, rows: np.ndarray, index: int) -> None:
        self.rows = rows
        self.row: np.ndarray = rows[index]


class SharedAllocator:
    """Allocates shared memory: a file in /dev/shm that all ranks of the node map and that is then unlinked.

    Unlike an MPI window it needs no collective call to be freed: the memory is released with the last tensor
    of the last rank that refers to it, also when some of the ranks have died.
    """

    def __init__(self, node: Communicator) -> None:
        self._node = node
        self._warned = False

    def allocate(self, nbytes: int) -> SharedMemory | None:
        """Return zeroed memory of `nbytes` a rank, or None where there is no shared memory.

        Collective over the node; the result is None on all of its ranks or on none.
        """
        size = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
        node = self._node
        if node.size == 1:
            private = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return SharedMemory(np.frombuffer(private, np.uint8).reshape(1, size), 0)
        size = max(node.gather_objects(size, _OPERATION))
        created = _attempt(lambda: _create(size * node.size)) if node.rank == 0 else ("", "")
        path, problem = node.gather_objects(created, _OPERATION)[0]
        memory = None
        if not problem:
            memory, problem = _attempt(lambda: _map(path, size * node.size))
        problems = node.gather_objects(problem, _OPERATION)
        if node.rank == 0 and path:
            os.unlink(path)
        if any(problems) or memory is None:
            self._warn(next(filter(None, problems)))
            return None
        rows = np.frombuffer(memory, np.uint8).reshape(node.size, size)
        rows[node.rank] = 0  # first touch by the rank that uses it places the pages near its core
        node.barrier(_OPERATION)
        return SharedMemory(rows, node.rank)

    def _warn(self, problem: str) -> None:
        if self._node.rank == 0 and not self._warned:
            warnings.warn(
                f"no shared memory on this node ({problem}): private buffers and MPI's own "
                "all-reduce are used instead, which is slower; give the node a larger /dev/shm",
                RuntimeWarning,
                stacklevel=2,
            )
        self._warned = True


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result of an action and "", or None and the error."""
    try:
        return action(), ""
    except OSError as error:
        return None, str(error)


def _create(nbytes: int) -> str:
    descriptor, path = tempfile.mkstemp(prefix="hpcsgd-", dir=_SHARED)
    try:
        # All of it at once: a lack of memory would otherwise raise SIGBUS in the middle of training.
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError:
        free = shutil.disk_usage(_SHARED).free >> 20
        os.unlink(path)
        raise OSError(f"{_SHARED} has {free} MiB free of {nbytes >> 20} needed") from None
    finally:
        os.close(descriptor)
    return path


def _map(path: str, nbytes: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)
