"""The ranks of one node: their communicator, shared memory, barriers and compute threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.diagnostics.activity import phase
from hpcsgd.mpi import environment, shutdown
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.shared_memory import SharedAllocator, SharedMemory
from hpcsgd.mpi.tasks import Wait

if TYPE_CHECKING:
    from hpcsgd.mpi.device_windows import DeviceAllocator

NATIVE_WAIT_SLICE = 5_000  # microseconds that a wait in native code may last before it returns to Python
_SLOT_BYTES = 16 * 1024  # above, reading the messages of all ranks costs more than a second barrier


class Node:
    """The ranks of one node.

    Parameters
    ----------
    comm
        The communicator of the node.
    members
        For each of its ranks the rank in the world.
    shared_memory, device_windows
        False behaves as if the node had no shared memory, or no device memory that its ranks share.

    Attributes
    ----------
    flags
        The barrier's words in shared memory; None where there is none, or for a single rank.
    threads
        The number of threads with which this rank may compute, given the other ranks on its cores.
    spins
        Polls of a wait in native code before it yields.
    """

    def __init__(
        self,
        comm: Communicator,
        members: Sequence[int],
        *,
        shared_memory: bool,
        device_windows: bool,
    ) -> None:
        self.comm, self.members = comm, list(members)
        self.rank, self.size = comm.rank, comm.size
        self._shared_memory = shared_memory
        binding = os.sched_getaffinity(0)
        settings = comm.gather_objects((binding, device_windows), "the comparison of core bindings")
        bindings, self._device_windows = [each for each, _ in settings], all(each for _, each in settings)
        self.threads, self.spins = environment.share_of_cores(binding, bindings, environment.cpu_quota())
        if self.members[0] == 0 == self.rank:
            environment.warn_of_narrow_binding(binding, bindings)
        self._allocator = SharedAllocator(comm)
        self._device_allocator: DeviceAllocator | None = None
        if self.rank == 0:
            shutdown.unlink_mpich_segments()
        self.flags: np.ndarray | None = None
        self._slots: dict[tuple[int, np.dtype[Any]], np.ndarray] = {}
        self._parity = 0
        if self.size > 1:
            self._allocate_barrier()

    def _allocate_barrier(self) -> None:
        with phase("importing numba"):
            from hpcsgd.kernels.sums import node_reduce
            from hpcsgd.kernels.sync import barrier

        memory = self.allocate(barrier.flags_size(self.size))
        if memory is not None:
            self.flags = memory.rows[0].view(np.int32)
            for parity, slots in enumerate((self.allocate(_SLOT_BYTES), self.allocate(_SLOT_BYTES))):
                for dtype in map(np.dtype, (np.float32, np.float64)):
                    if slots is not None:
                        self._slots[parity, dtype] = slots.rows.view(dtype)
            self.compile_kernels(node_reduce.warm_up)

    def allocate(self, nbytes: int) -> SharedMemory | None:
        """Return zeroed shared memory of `nbytes` a rank, or None; collective over the node.

        `HPCSGD_SHARED_MEMORY=0` behaves as if there were none.
        """
        return self._allocator.allocate(nbytes) if self._shared_memory else None

    def allocate_on_device(self, nbytes: int, device: torch.device) -> list[Tensor] | None:
        """Return zeroed device memory of each rank, which all of them use, or None; collective over the node.

        See `DeviceAllocator.allocate`. None also without shared memory, in which ranks wait for each other,
        and with `HPCSGD_DEVICE_WINDOWS=0`.
        """
        if self.size == 1:
            return [torch.zeros(nbytes, dtype=torch.uint8, device=device)]
        from hpcsgd.kernels.sums import device_sums
        from hpcsgd.mpi.device_windows import DeviceAllocator

        if not self._device_windows or self.flags is None or self.size > device_sums.MOST_TENSORS:
            return None

        is_first = self._device_allocator is None
        allocator = self._device_allocator = self._device_allocator or DeviceAllocator(self.comm)
        rows = allocator.allocate(nbytes, device)
        if is_first and rows is not None:
            self.compile_kernels(lambda: device_sums.warm_up(device))
        return rows

    def next_slots(self, nbytes: int, dtype: np.dtype[Any]) -> np.ndarray | None:
        """Return one shared row a rank, for messages of `nbytes` that all ranks read; None for larger ones.

        Two sets alternate, in the same calls on every rank: before a rank writes into a set again, it has
        passed the barrier after which all ranks had read it.
        """
        if nbytes > _SLOT_BYTES or (1, dtype) not in self._slots or (0, dtype) not in self._slots:
            return None
        self._parity = 1 - self._parity
        return self._slots[self._parity, dtype]

    def arrive(self) -> Wait:
        """Arrive at the barrier, by flags in shared memory; return the wait for all ranks of the node."""
        from hpcsgd.kernels.sync import barrier

        flags = self.flags
        assert flags is not None, "only where the node has shared memory"
        target = barrier.arrive(flags, self.size, self.rank)
        return Wait(
            lambda: bool(barrier.wait(flags, target, self.spins, NATIVE_WAIT_SLICE)),
            lambda: self.missing(int(target)),
        )

    def missing(self, target: int) -> list[int]:
        """Return the global ranks that have not arrived at a generation of the barrier."""
        from hpcsgd.kernels.sync import barrier

        assert self.flags is not None
        return [self.comm.ranks[r] for r in barrier.missing_ranks(self.flags, self.size, target)]

    def make_barrier(self) -> NodeBarrier:
        """Return a separate barrier that is passed without waiting; collective over the node."""
        return NodeBarrier(self.comm, self.allocate)

    def compile_kernels(self, warm_up: Callable[[], None]) -> None:
        """Compile kernels on one rank of the node and load them from the cache on the others; collective."""
        for selected in (self.rank == 0, self.rank != 0):
            if selected:
                with phase("compiling kernels"):
                    warm_up()
            self.comm.barrier("the compilation of kernels")

    def release(self) -> None:
        """Release the shared memory of the barrier."""
        self.flags = None
        self._slots.clear()

    def release_windows(self) -> Iterator[None]:
        """Release the windows of device memory; what follows the yield after all ranks have come to it."""
        if self._device_allocator is not None:
            self._device_allocator.unmap()
        yield
        if self._device_allocator is not None:
            self._device_allocator.free()


class NodeBarrier:
    """A barrier of a node's ranks that is passed without waiting; only where they share memory.

    Parameters
    ----------
    comm
        The communicator of the node.
    allocate
        Returns shared memory of so many bytes a rank.
    """

    def __init__(self, comm: Communicator, allocate: Callable[[int], SharedMemory | None]) -> None:
        from hpcsgd.kernels.sync import barrier

        self._kernel, self._size, self._rank, self._ranks = barrier, comm.size, comm.rank, comm.ranks
        memory = allocate(barrier.flags_size(self._size))
        assert memory is not None, "only where the node has shared memory"
        self._flags = memory.rows[0].view(np.int32)

    def arrive(self) -> Wait:
        """Arrive, once the previous generation is complete; return the wait for all ranks of the node."""
        kernel, flags = self._kernel, self._flags
        target = int(kernel.arrive(flags, self._size, self._rank))
        return Wait(
            lambda: bool(kernel.is_complete(flags, target)),
            lambda: [self._ranks[rank] for rank in kernel.missing_ranks(flags, self._size, target)],
        )
