"""Device memory that other processes map: CUDA's interprocess handles, by CuPy's runtime calls.

Decided from CUDA's and torch's documentation:

- A handle is that of a whole allocation of `cudaMalloc` (CUDA Runtime API, `cudaIpcGetMemHandle`), and not
  available for memory of virtual addresses, from which torch's allocator takes its expandable segments. So
  this memory is allocated by itself, and not taken from torch's allocator.
- A small allocation may be part of a larger block, which the handle then shares as a whole; sizes are thus
  multiples of 2 MiB (CUDA Programming Guide, Interprocess Communication).
- `cudaIpcMemLazyEnablePeerAccess` requests access between GPUs when a handle is opened; a handle may be of a
  device that is not visible to the process. So opening it is the test whether two ranks reach each other.
- A process cannot open its own handle, and memory must not be freed while others have it mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_LAZY_ENABLE_PEER_ACCESS, _GRANULARITY = 1, 2**21


class IpcError(Exception):
    """Device memory cannot be allocated for other processes, or not be mapped, with the reason."""


class _Owner:
    """Lives as long as a tensor on the memory."""

    def __init__(self, on_drop: Callable[[], None]) -> None:
        self._on_drop = on_drop

    def __del__(self) -> None:
        self._on_drop()


def allocate(nbytes: int, device: torch.device, on_drop: Callable[[], None]) -> tuple[Tensor, bytes]:
    """Allocate zeroed memory, which is freed by `free`.

    Parameters
    ----------
    nbytes
        Bytes, above 0.
    device
        The GPU.
    on_drop
        Called when the last tensor on the memory is dropped, by any thread.

    Returns
    -------
    (tensor, handle)
        (nbytes,) uint8, and the handle for `open_handle` in other processes.

    Raises
    ------
    IpcError
        No memory, no CuPy, or a system that has no such handles.
    """
    with _cupy_on(device) as cupy:
        runtime, size = cupy.cuda.runtime, -(-nbytes // _GRANULARITY) * _GRANULARITY
        try:
            address = runtime.malloc(size)
        except runtime.CUDARuntimeError:
            torch.cuda.empty_cache()  # what torch's allocator holds, and no tensor uses
            address = runtime.malloc(size)
        try:
            handle: bytes = runtime.ipcGetMemHandle(address)
            runtime.memset(address, 0, size)
            runtime.deviceSynchronize()  # other processes read it from now on
            return _tensor(cupy, address, nbytes, device, _Owner(on_drop)), handle
        except BaseException:
            runtime.free(address)
            raise


def open_handle(handle: bytes, nbytes: int, device: torch.device) -> Tensor:
    """Map another process's memory of `nbytes`; returns it as a tensor of this process's device.

    Raises
    ------
    IpcError
        The memory cannot be reached from here.
    """
    with _cupy_on(device) as cupy:
        address = cupy.cuda.runtime.ipcOpenMemHandle(handle, _LAZY_ENABLE_PEER_ACCESS)
        return _tensor(cupy, address, nbytes, device, None)


def close_handle(address: int, device: torch.device) -> None:
    """Unmap what `open_handle` has mapped at an address, once the device has done what is queued."""
    with _cupy_on(device) as cupy:
        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.runtime.ipcCloseMemHandle(address)


def free(address: int, device: torch.device) -> None:
    """Free what `allocate` has allocated, once the device has done what is queued."""
    with _cupy_on(device) as cupy:
        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.runtime.free(address)


@contextmanager
def _cupy_on(device: torch.device) -> Iterator[Any]:
    """Context on a device, with CuPy, in which any error becomes an `IpcError`."""
    try:
        import cupy

        with cupy.cuda.Device(device.index or 0):
            yield cupy
    except ImportError as error:
        raise IpcError(f"CuPy cannot be imported: {error}") from error
    except Exception as error:  # errors of CuPy, the driver and torch have no common class
        raise IpcError(f"{type(error).__name__}: {error}") from error


def _tensor(cupy: Any, address: int, nbytes: int, device: torch.device, owner: _Owner | None) -> Tensor:
    # The device is given, not looked up: memory of another GPU is used by kernels of this one.
    memory = cupy.cuda.UnownedMemory(address, nbytes, owner, device.index or 0)
    array = cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
    tensor: Tensor = from_dlpack(array)
    return tensor
