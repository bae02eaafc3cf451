"""Memory of the stand-in: addresses that fault, backed by others that only its work reads."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tests.support.standin.streams import current_stream, work

_RANGE, _BLOCK = 2**36, 512  # bytes of addresses, and the granularity of blocks
_NO_ACCESS, _READ_WRITE, _PRIVATE_ANONYMOUS_NORESERVE, _FIXED, _SHARED_FIXED = 0, 3, 0x4022, 0x10, 0x11
_EXTENSION_DEVICE, _UNSIGNED = 12, 1  # of DLPack


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("index", ctypes.c_int32)]


class _Dtype(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("dimensions", ctypes.c_int32),
        ("dtype", _Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]


def _map(address: int | None, nbytes: int, access: int, flags: int, descriptor: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    found = int(libc.mmap(address, nbytes, access, flags, descriptor, 0))
    assert found != 2**64 - 1, os.strerror(ctypes.get_errno())
    return found


def _reserve(access: int) -> int:
    return _map(None, _RANGE, access, _PRIVATE_ANONYMOUS_NORESERVE, -1)


def _new_capsule(managed: _Managed) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(managed), b"dltensor", None)


class _Memory:
    """Hands out blocks; a freed one is filled with NaN by the stream on which it was allocated."""

    def __init__(self) -> None:
        self._faulting, self._real = _reserve(_NO_ACCESS), _reserve(_READ_WRITE)
        self._end = 0
        self._free: dict[int, list[int]] = {}
        self._live: dict[int, Any] = {}
        self._dropped: deque[tuple[int, int, Any]] = deque()
        self._deleter = _Deleter(self._drop)

    def allocate(self, nbytes: int) -> Tensor:
        """Return a new one-dimensional uint8 tensor of the device."""
        size = -(-max(nbytes, 1) // _BLOCK) * _BLOCK
        with work.lock:
            self.queue_frees()
            offset = self._free[size].pop() if self._free.get(size) else self._end
            self._end = max(self._end, offset + size)
        block = offset, size, current_stream()
        return self._tensor(offset, nbytes, lambda: self._dropped.append(block))

    def map_file(self, descriptor: int, nbytes: int, on_drop: Callable[[], None]) -> Tensor:
        """Return a tensor of the device on the memory of a file, until `unmap`."""
        with work.lock:
            offset = -(-self._end // mmap.PAGESIZE) * mmap.PAGESIZE
            self._end = offset + -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        _map(self._real + offset, nbytes, _READ_WRITE, _SHARED_FIXED, descriptor)
        return self._tensor(offset, nbytes, on_drop)

    def unmap(self, address: int, nbytes: int) -> None:
        """Let work that still uses the memory of a file fault."""
        _map(self.real_address(address), nbytes, _NO_ACCESS, _PRIVATE_ANONYMOUS_NORESERVE | _FIXED, -1)

    def _tensor(self, offset: int, nbytes: int, on_drop: Callable[[], None]) -> Tensor:
        shape, strides = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
        device, dtype = _Device(_EXTENSION_DEVICE, 0), _Dtype(_UNSIGNED, 8, 1)
        managed = _Managed(
            _DLTensor(self._faulting + offset, device, 1, dtype, shape, strides, 0), None, self._deleter
        )
        self._live[ctypes.addressof(managed)] = managed, shape, strides, on_drop
        return from_dlpack(_new_capsule(managed))

    def _drop(self, pointer: Any) -> None:
        # Called wherever the last reference ends, also under the lock: it only takes a note.
        *_, on_drop = self._live.pop(ctypes.addressof(pointer.contents))
        on_drop()

    def queue_frees(self) -> None:
        """Queue the end of blocks that were dropped, on their streams."""
        while self._dropped:
            offset, size, stream = self._dropped.popleft()
            stream.queue(lambda offset=offset, size=size: self._poison(offset, size))

    def _poison(self, offset: int, size: int) -> None:
        ctypes.memset(self._real + offset, 0xFF, size)
        self._free.setdefault(size, []).append(offset)

    def real_address(self, address: int) -> int:
        """Return the readable address for one of the device; 0 for 0."""
        offset = address - self._faulting
        if address and not 0 <= offset < _RANGE:
            raise ValueError("memory of the host is given to a kernel of the device")
        return self._real + offset if address else 0

    def contents(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the host over the memory of one of the device, for work that is being done."""
        if torch.is_inference_mode_enabled():  # which may have ended when the work is done
            with torch.inference_mode(False):
                return self.contents(tensor)
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0:
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        memory = (ctypes.c_char * nbytes).from_address(self.real_address(storage.data_ptr()))
        flat = torch.frombuffer(memory, dtype=torch.uint8)[
            : nbytes // tensor.element_size() * tensor.element_size()
        ]
        found = flat.view(tensor.dtype).as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
        found = found.conj() if tensor.is_conj() else found
        return torch._neg_view(found) if tensor.is_neg() else found


memory = _Memory()
