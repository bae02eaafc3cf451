"""Memory of tensors: storages of their own, elements that tensors share, expanded dimensions."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

#: Dtypes that every version of DLPack has.
_DLPACK_DTYPES = {
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.complex128,
    torch.int32,
    torch.int64,
}


def with_own_storage(view: Tensor) -> Tensor:
    """Return a tensor on the memory of a dense view, with equal strides, whose storage is just that memory.

    Programs that save or copy models take tensors of one storage for shared ones, and write all of it. The
    storage refers to the view's, which thus lives as long.
    """
    if view.dtype in _DLPACK_DTYPES:
        found: Tensor = from_dlpack(to_dlpack(view))  # a seventh of the time of from_dlpack(view)
        # DLPack changes the strides of dimensions of size 1.
        return found if found.stride() == view.stride() else found.as_strided(view.size(), view.stride())
    flat = view.as_strided((view.numel(),), (1,)).view(torch.uint8)
    found = from_dlpack(to_dlpack(flat))
    return found.view(view.dtype).as_strided(view.size(), view.stride())


def pinned(nbytes: int, device: torch.device) -> Tensor:
    """Return zeroed host memory, (nbytes,) uint8, that a GPU, if `device` is one, copies without the host."""
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda", device="cpu")


class _Registration:
    """Host memory that a GPU copies without the host, as long as an array refers to this."""

    def __init__(self, memory: np.ndarray) -> None:
        self.__array_interface__ = memory.__array_interface__
        self._memory = memory
        self._cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(self._cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        self._registered = code == 0
        if code:
            warnings.warn(
                f"host memory is not pinned (cudaHostRegister: error {code}): copies between the GPU and the "
                "host are slower; raise the limit of locked memory (ulimit -l)",
                RuntimeWarning,
                stacklevel=2,
            )

    def __del__(self) -> None:
        # Before the memory is unmapped: its addresses may be given out again, and registered then.
        if self._registered:
            with suppress(Exception):  # at the end of the process CUDA may be gone
                self._cudart.cudaHostUnregister(self._memory.ctypes.data)


def registered(memory: np.ndarray) -> Tensor:
    """Return host memory, (nbytes,), uint8, as a tensor, pinned until the last tensor on it is dropped."""
    return torch.from_numpy(np.asarray(_Registration(memory)))


def without_repetition(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that an expanded one repeats: its dimensions of stride 0 have size 1."""
    if 0 not in tensor.stride():
        return tensor
    for dimension, (size, stride) in enumerate(zip(tensor.size(), tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


@torch.no_grad()
def overwrite(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors of one dtype, which may be conjugate views or made in inference mode."""
    if not any(each.is_conj() or each.is_neg() or _is_of_inference(each) for each in targets):
        torch._foreach_copy_(list(targets), list(values))
        return
    for target, value in zip(targets, values, strict=True):
        with torch.inference_mode() if _is_of_inference(target) else nullcontext():
            target.copy_(value)


def _is_of_inference(tensor: Tensor) -> bool:
    """Whether it was made in inference mode; `is_inference()` forgets that when `tensor.data` is set."""
    try:
        return tensor._version < 0
    except RuntimeError:
        return True


def place(tensor: Tensor) -> tuple[object, ...]:
    """Return address, shape, strides and dtype: equal for tensors that are the same memory."""
    return tensor.data_ptr(), tensor.size(), tensor.stride(), tensor.dtype


def with_other_views(tensors: Sequence[tuple[str, Tensor]]) -> str | None:
    """Return the name of a tensor whose storage some tensor uses that is none of these; None: none does."""
    storages = [tensor.untyped_storage() for _, tensor in tensors]
    users = Counter(storage._cdata for storage in storages)
    for (name, _), storage in zip(tensors, storages, strict=True):
        # The storage objects of Python count once.
        if torch._C._storage_Use_Count(storage._cdata) > users[storage._cdata] + 1:
            return name
    return None


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements lie side by side, each at an address of its own, in whatever order."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def overlapping(tensors: Sequence[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """Return the names of two tensors that share only some elements, or in another order; None: none do.

    Twice the same name if elements of one tensor share memory, as those of an expanded tensor.
    """
    distinct = {place(tensor): (name, tensor) for name, tensor in tensors if tensor.numel()}
    pairs = map(_shared_bytes, _clusters(list(distinct.values())))
    return next((pair for pair in pairs if pair is not None), None)


def _clusters(tensors: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield tensors whose address ranges overlap, and single ones that are not dense."""
    spans = sorted((tensor.data_ptr(), index) for index, (_, tensor) in enumerate(tensors))
    cluster: list[tuple[str, Tensor]] = []
    end = 0
    for start, index in spans:
        if start >= end:
            if len(cluster) > 1 or (cluster and not is_dense(cluster[0][1])):
                yield cluster
            cluster = []
        cluster.append(tensors[index])
        end = max(end, start + _span(tensors[index][1]))
    if len(cluster) > 1 or (cluster and not is_dense(cluster[0][1])):
        yield cluster


def _span(tensor: Tensor) -> int:
    """Return the bytes from the first element to the end of the last one."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    steps = zip(tensor.size(), tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _shared_bytes(cluster: list[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """Return the names of two tensors of a cluster that share bytes."""
    first = cluster[0][1].data_ptr()
    length = max(tensor.data_ptr() + _span(tensor) for _, tensor in cluster) - first
    marks = torch.zeros(length, dtype=torch.int32, device="cpu")
    for number, (name, tensor) in enumerate(cluster, 1):
        width = tensor.element_size()
        strides = (*(stride * width for stride in tensor.stride()), 1)
        bytes_of = marks.as_strided((*tensor.size(), width), strides, tensor.data_ptr() - first)
        if other := int(bytes_of.max()):
            return cluster[other - 1][0], name
        bytes_of.fill_(number)
        if int((marks == number).sum()) < bytes_of.numel():
            return name, name
    return None
