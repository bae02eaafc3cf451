"""Windows of device memory: allocations of each rank of a node that the others map, by CUDA IPC."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import cuda_ipc
from hpcsgd.mpi.communicator import Communicator

_OPERATION = "the allocation of device memory for the node"


@dataclass
class _Window:
    """One allocation of each rank of the node."""

    device: torch.device
    #: What this rank has allocated, and what it has mapped of the others.
    own: int
    mapped: list[int] = field(default_factory=list)


class DeviceAllocator:
    """Allocates device memory that all ranks of the node read and write, on one GPU or on several.

    Memory must not be freed while another rank has it mapped. So a window that every rank has dropped is
    unmapped by all, and then freed, when the next one is allocated, or when the world is closed.

    Notes
    -----
    A world of which a rank has died keeps its windows until the process ends.
    """

    def __init__(self, node: Communicator) -> None:
        self._node = node
        self._windows: dict[int, _Window] = {}
        #: Windows of which this rank has no tensor any more; those that the others cannot reach any more.
        self._dropped: set[int] = set()
        self._released: dict[int, _Window] = {}
        self._count = 0
        self._warned = False

    def allocate(self, nbytes: int, device: torch.device) -> list[Tensor] | None:
        """Return zeroed memory of each rank, (at least nbytes,) uint8, in rank order, or None.

        All tensors are of this rank's device, on which kernels use them. Collective over the node; None on
        all of its ranks or on none: where there is no CuPy, or a rank cannot reach the memory of another.
        """
        self._free_dropped()
        node, self._count = self._node, self._count + 1
        number = self._count
        size = max(node.gather_objects(nbytes, _OPERATION))
        own: Tensor | None = None
        handle, problem = b"", ""
        try:
            own, handle = cuda_ipc.allocate(size, device, functools.partial(self._on_drop, number))
        except cuda_ipc.IpcError as error:
            problem = str(error)
            self._dropped.add(number)
        offers = node.gather_objects((handle, problem), _OPERATION)
        rows: list[Tensor] = []
        if not any(problem for _, problem in offers) and own is not None:
            try:
                for rank, (other, _) in enumerate(offers):
                    rows.append(own if rank == node.rank else cuda_ipc.open_handle(other, size, device))
            except cuda_ipc.IpcError as error:
                problem = str(error)
        if own is not None:
            mapped = [row.data_ptr() for row in rows if row is not own]
            self._windows[number] = _Window(device, own.data_ptr(), mapped)
        problems = node.gather_objects(problem, _OPERATION)
        if any(problems):
            self._warn(next(filter(None, problems)))
            return None  # what has been allocated is dropped, and freed with the next one
        return rows

    def unmap(self) -> None:
        """Unmap the memory of other ranks; local, after the last use of it by this rank."""
        for window in self._windows.values():
            _unmap(window)

    def free(self) -> None:
        """Free the memory of this rank once it is dropped; local, after all ranks have called `unmap`."""
        # A model may outlive its world.
        self._released, self._windows, self._count = self._windows, {}, 0
        for number in sorted(self._dropped):
            self._on_drop(number)

    def _on_drop(self, number: int) -> None:
        """Take note that no tensor is on a window of this rank; called by any thread."""
        window = self._released.pop(number, None)
        if window is None:
            self._dropped.add(number)
        else:
            with contextlib.suppress(HpcsgdError):  # at the end of the process
                _free(window)

    def _free_dropped(self) -> None:
        if self._count == 0:
            return
        dropped = self._node.gather_objects(sorted(self._dropped), _OPERATION)
        for number in sorted(set.intersection(*map(set, dropped))):
            window = self._windows.pop(number, None)  # None: this rank had no memory
            self._dropped.discard(number)
            if window is not None:
                _unmap(window)
            self._node.barrier(_OPERATION)
            if window is not None:
                _free(window)

    def _warn(self, problem: str) -> None:
        if self._node.rank == 0 and not self._warned:
            warnings.warn(
                f"the ranks of this node do not share device memory ({problem}): buckets are copied through "
                "the host, which is slower; install CuPy (pip install '.[gpu]'), start one container for all "
                "ranks of a node, or set HPCSGD_DEVICE_WINDOWS=0 to accept it",
                RuntimeWarning,
                stacklevel=2,
            )
        self._warned = True


def _unmap(window: _Window) -> None:
    with _explained():
        for address in window.mapped:
            cuda_ipc.close_handle(address, window.device)
    window.mapped = []


def _free(window: _Window) -> None:
    with _explained():
        cuda_ipc.free(window.own, window.device)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except cuda_ipc.IpcError as error:
        raise HpcsgdError(
            "device memory that the ranks of a node share cannot be released",
            got=str(error),
            do="look for an earlier error of the GPU, which all later calls report, and start the job anew",
        ) from error
