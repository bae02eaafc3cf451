"""Tensor groups: many tensors as views of one flat buffer, cut in buckets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import BadOption
from hpcsgd.mpi.shared_memory import Window
from hpcsgd.mpi.world import World

#: What can be averaged; a group of anything else can only be broadcast and gathered.
SUMMABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEFAULT_BUCKET_MIB = 4.0
#: Words of packed codes are added as unsigned numbers.
_KERNEL_DTYPES: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int32: np.uint32,
    torch.int64: np.uint64,
}
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@dataclass
class Bucket:
    """A stretch of a group's flat buffer that is communicated as one message.

    Attributes
    ----------
    index
        Its place in the order of communication, the same on every rank.
    names, views
        The tensors in it, views of `flat`.
    flat
        1-D tensor of all its elements on the group's device, zero in the gaps that align the views.
    host
        The same on the host: what is communicated. On a CPU it is `flat` itself.
    rows
        1-D tensors: this bucket of every rank of the node, in place; empty without shared memory.
    start
        Where it begins in the group's rows, in elements of its dtype.
    mine
        The part of it that this rank reduces for the ranks of its node.
    matrix
        The whole rows of the node's ranks, (ranks on the node, elements), for the kernels; not of half
        precisions.
    """

    world: World
    index: int
    names: list[str]
    views: list[Tensor]
    flat: Tensor
    host: Tensor
    rows: list[Tensor] = field(default_factory=list)
    start: int = 0
    mine: slice = field(default_factory=lambda: slice(0))
    matrix: np.ndarray | None = None

    @property
    def numel(self) -> int:
        return self.flat.numel()

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    def extent(self, view: Tensor) -> tuple[int, int]:
        """The elements of `flat`, [start, stop), that one of `views` has."""
        start = int(view.storage_offset()) - int(self.flat.storage_offset())
        return start, start + view.numel()

    def part(self, index: int, parts: int) -> slice:
        """The elements of one of `parts` nearly equal slices, cut at cache lines."""
        return cut(self.flat, index, parts)

    def clear_gaps(self, part: slice) -> None:
        """Make the gaps between tensors zero again, in this part of the bucket."""
        begin = 0
        for start, stop in [*map(self.extent, self.views), (self.numel, 0)]:
            first, last = max(begin, part.start), min(start, part.stop)
            if first < last:
                self.flat[first:last] = 0
            begin = stop

    def __str__(self) -> str:
        return f"bucket {self.index}"


class TensorGroup:
    """Tensors of one model as views of one flat buffer; the object that every collective takes.

    On the host the buffer lies in memory that the node's ranks share, where that can be had.

    Parameters
    ----------
    world
        The ranks; all of them make the same group.
    tensors
        (name, tensor) pairs: they give names, shapes, strides and dtypes (also mixed); the order of
        the group is the order of communication.
    bucket_mib
        Size of a bucket in MiB; a larger tensor has a bucket of its own. Default 4.
    staged
        Whether the model's memory and the communicated memory are apart; default: on a GPU, where the
        latter is pinned.

    Attributes
    ----------
    views
        One tensor per name, zero at the start, with the shape and strides of the model tensor.
    buckets
        The stretches of the buffer, in order. A bucket holds one dtype.
    """

    def __init__(
        self,
        world: World,
        tensors: Iterable[tuple[str, Tensor]],
        bucket_mib: float = DEFAULT_BUCKET_MIB,
        *,
        staged: bool | None = None,
    ) -> None:
        if not bucket_mib > 0:
            raise BadOption("bucket size", expected="MiB, above 0", got=bucket_mib)
        self.world = world
        templates = list(tensors)
        plans = _plan(templates, bucket_mib * 2**20)
        self.nbytes = sum(nbytes for _, nbytes in plans)
        window = world.window(max(self.nbytes, ALIGNMENT))
        # Every rank of the job takes the same path, so one node without a window is enough to go without.
        self._window = window if all(world.gather(window is not None)) else None
        host = self._host_memory()
        staged = world.device.type != "cpu" if staged is None else staged
        device_memory = torch.zeros_like(host, device=world.device) if staged else host
        self.buckets: list[Bucket] = []
        offset = 0
        for index, (members, nbytes) in enumerate(plans):
            self.buckets.append(self._bucket(index, members, offset, nbytes, host, device_memory))
            offset += nbytes
        self.views = {
            name: view
            for bucket in self.buckets
            for name, view in zip(bucket.names, bucket.views, strict=True)
        }

    @property
    def shared(self) -> bool:
        """Whether ranks see each other's buffers on the nodes that have several; the same on all."""
        return self._window is not None and self.world.widest > 1

    def __len__(self) -> int:
        return len(self.buckets)

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self.buckets)

    def _host_memory(self) -> Tensor:
        if self._window is not None:
            memory = torch.from_numpy(self._window.row)
            if self.world.device.type == "cuda":
                _pin(memory)
            return memory
        size = max(self.nbytes, ALIGNMENT)
        return torch.zeros(size, dtype=torch.uint8, pin_memory=self.world.device.type == "cuda")

    def _bucket(
        self,
        index: int,
        members: list[tuple[str, Tensor]],
        offset: int,
        nbytes: int,
        host: Tensor,
        device_memory: Tensor,
    ) -> Bucket:
        dtype = members[0][1].dtype
        flat = device_memory[offset : offset + nbytes].view(dtype)
        views, position = [], 0
        for _, tensor in members:
            views.append(_view(flat, position, tensor))
            position += _aligned(tensor)
        bucket = Bucket(
            self.world,
            index,
            [name for name, _ in members],
            views,
            flat,
            flat if device_memory is host else host[offset : offset + nbytes].view(dtype),
            start=offset // dtype.itemsize,
            mine=cut(flat, self.world.local_rank, self.world.local_size),
        )
        if self.shared:
            window: Window | None = self._window
            assert window is not None
            bucket.rows = [torch.from_numpy(row)[offset : offset + nbytes].view(dtype) for row in window.rows]
            if dtype in _KERNEL_DTYPES:
                bucket.matrix = window.rows.view(_KERNEL_DTYPES[dtype])
        return bucket


def cut(flat: Tensor, index: int, parts: int) -> slice:
    """The elements of one of `parts` nearly equal slices of a 1-D tensor, cut at cache lines."""
    line = ALIGNMENT // flat.element_size()
    lines = -(-flat.numel() // line)
    first, last = lines * index // parts, lines * (index + 1) // parts
    return slice(min(first * line, flat.numel()), min(last * line, flat.numel()))


def _plan(
    templates: Sequence[tuple[str, Tensor]], limit: float
) -> list[tuple[list[tuple[str, Tensor]], int]]:
    """Members and bytes of each bucket: in the given order, a new one at each change of dtype."""
    plans: list[tuple[list[tuple[str, Tensor]], int]] = []
    for name, tensor in templates:
        nbytes = _aligned(tensor) * tensor.element_size()
        if plans:
            members, size = plans[-1]
            if members[0][1].dtype == tensor.dtype and size + nbytes <= limit:
                plans[-1] = ([*members, (name, tensor)], size + nbytes)
                continue
        plans.append(([(name, tensor)], nbytes))
    return plans


def _aligned(tensor: Tensor) -> int:
    """Elements that a tensor takes up in the buffer."""
    line = ALIGNMENT // tensor.element_size()
    return math.ceil(tensor.numel() / line) * line


def _view(flat: Tensor, position: int, like: Tensor) -> Tensor:
    stretch = flat[position : position + like.numel()]
    if torch.empty_like(like, device="meta").stride() == like.stride():
        # Dense, maybe channels_last: with the same strides autograd and optimizers keep their fast paths.
        return stretch.as_strided(like.size(), like.stride())
    return stretch.view(like.size())


def _pin(memory: Tensor) -> None:
    """Let the GPU copy straight to and from memory that MPI allocated."""
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister failed with {code}")
