"""Memory that all ranks of a node can read and write in place."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from hpcsgd.mpi.communicator import Transport

T = TypeVar("T")
_PAGE = 4096
_SHARED = "/dev/shm"
_WHAT = "the allocation of a shared window"


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
    """Allocates windows: a file in memory that all ranks of the node map, and that has no name any more.

    Unlike a window of MPI it is taken away by nobody: it is gone when the last tensor of the last rank
    that looks into it is, without a word between them, also when some of these ranks have died.

    Parameters
    ----------
    node
        The ranks of this node.
    """

    def __init__(self, node: Transport) -> None:
        self._node = node
        self._warned = False

    def allocate(self, nbytes: int) -> Window | None:
        """A zeroed window of `nbytes` a rank; None where shared memory cannot be had.

        Collective over the node; all of its ranks get a window or none does.
        """
        size = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
        node = self._node
        if node.size == 1:
            # Nobody to share with.
            alone = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return Window(np.frombuffer(alone, np.uint8).reshape(1, size), 0)
        size = max(node.gather_objects(size, _WHAT))
        made = _attempt(lambda: _create(size * node.size)) if node.rank == 0 else ("", "")
        path, problem = node.gather_objects(made, _WHAT)[0]
        memory = None
        if not problem:
            memory, problem = _attempt(lambda: _map(path, size * node.size))
        problems = node.gather_objects(problem, _WHAT)
        if node.rank == 0 and path:
            os.unlink(path)
        if any(problems) or memory is None:
            self._warn(next(filter(None, problems)))
            return None
        rows = np.frombuffer(memory, np.uint8).reshape(node.size, size)
        rows[node.rank] = 0  # by the rank that works with it, near whose core its pages then are
        node.barrier(_WHAT)
        return Window(rows, node.rank)

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
    """What an action gives, or else what is in its way."""
    try:
        return action(), ""
    except OSError as error:
        return None, str(error)


def _create(nbytes: int) -> str:
    descriptor, path = tempfile.mkstemp(prefix="hpcsgd-", dir=_SHARED)
    try:
        # All of it at once: what is lacking would else show itself as SIGBUS in the middle of training.
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
