"""Memory of the stand-in that other processes map, in the place of CUDA's interprocess handles."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpcsgd.mpi import cuda_ipc
from tests.support.standin.memory import memory
from tests.support.standin.operators import NAME
from tests.support.standin.streams import synchronize, work

#: Bytes of what is mapped, and the file of what is allocated, by address.
sizes: dict[int, int] = {}
_files: dict[int, int] = {}
#: Allocations that were freed while work was being done.
_late: list[int] = []
#: Let the next so many handles of this process not be opened.
refused = [0]


def install() -> None:
    """Let the functions of `cuda_ipc` work for the stand-in too."""
    for name, function in {
        "allocate": _allocate,
        "open_handle": _open_handle,
        "close_handle": _close_handle,
        "free": _free,
    }.items():
        setattr(cuda_ipc, name, _for_device(function, getattr(cuda_ipc, name)))


def _for_device(here: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        device = next(each for each in arguments if isinstance(each, torch.device))
        return (here if device.type == NAME else otherwise)(*arguments)

    return call


def _allocate(nbytes: int, _: torch.device, on_drop: Callable[[], None]) -> tuple[Tensor, bytes]:
    _free_late()
    descriptor = os.memfd_create("standin")
    os.ftruncate(descriptor, nbytes)
    tensor = memory.map_file(descriptor, nbytes, on_drop)
    _files[tensor.data_ptr()], sizes[tensor.data_ptr()] = descriptor, nbytes
    return tensor, f"/proc/{os.getpid()}/fd/{descriptor}".encode()


def _open_handle(handle: bytes, nbytes: int, _: torch.device) -> Tensor:
    if refused[0]:
        refused[0] -= 1
        raise cuda_ipc.IpcError("peer access is not supported")
    descriptor = os.open(handle, os.O_RDWR)
    tensor = memory.map_file(descriptor, nbytes, lambda: None)
    os.close(descriptor)
    sizes[tensor.data_ptr()] = nbytes
    return tensor


def _close_handle(address: int, _: torch.device) -> None:
    synchronize()
    memory.unmap(address, sizes.pop(address))


def _free(address: int, _: torch.device) -> None:
    _late.append(address)
    with work.lock:
        if not work.is_being_done:
            _free_late()


def _free_late() -> None:
    while _late:
        address = _late.pop()
        synchronize()
        os.close(_files.pop(address))
        memory.unmap(address, sizes.pop(address))
