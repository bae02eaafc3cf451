"""Tensor groups: tensors as views of one flat buffer, divided into buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hpcsgd.mpi.shared_memory import SharedMemory
from hpcsgd.mpi.world import World
from hpcsgd.registry import checked
from hpcsgd.registry.limits import BucketMib
from hpcsgd.tensors.memory import is_dense, pinned, registered, with_own_storage

#: Dtypes that can be averaged; groups of other dtypes can only be broadcast and gathered.
SUMMABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEFAULT_BUCKET_MIB = 4.0
#: Words of packed codes are added as unsigned integers.
_KERNEL_DTYPES: dict[torch.dtype, type[np.generic]] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int32: np.uint32,
    torch.int64: np.uint64,
}
ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


@dataclass
class Bucket:
    """Consecutive tensors of a group that are communicated together.

    Attributes
    ----------
    host
        The copy in host memory, which is communicated. On a CPU it is `flat` itself; where `rows` are of the
        device it is allocated at first use.
    """

    world: World
    index: int  # position in the order of communication, equal on all ranks
    #: Its tensors, as views of `flat`; complex ones as pairs of real numbers.
    names: list[str]
    views: list[Tensor]
    #: 1-D tensor of all its elements on the group's device, zero in the gaps that align the views.
    flat: Tensor
    #: 1-D tensors: this bucket of each rank of the node, in memory that all of them read and write: of the
    #: host, or windows of device memory; empty without it.
    rows: list[Tensor] = field(default_factory=list)
    start: int = 0  # index of its first element in the rows of the group, in elements of its dtype
    #: The part that this rank reduces for the ranks of its node.
    own_part: slice = field(default_factory=lambda: slice(0))
    #: The complete rows of the node's ranks, (ranks on the node, elements), for the host's kernels; None for
    #: half precisions and without shared memory of the host.
    matrix: np.ndarray | None = None
    #: Host memory of the copy; None: none yet.
    host_memory: Tensor | None = None
    _host_parts: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def staged(self) -> bool:
        """Whether `host` is a copy of `flat`."""
        return self.host_memory is not self.flat

    @property
    def host(self) -> Tensor:
        if self.host_memory is None:
            self.host_memory = self.host_part(slice(0, self.numel))
        return self.host_memory

    def host_part(self, part: slice) -> Tensor:
        """Return pinned host memory for a part, allocated once."""
        key = part.start, part.stop
        if key not in self._host_parts:
            nbytes = (part.stop - part.start) * self.flat.element_size()
            self._host_parts[key] = pinned(nbytes, self.flat.device).view(self.flat.dtype)
        return self._host_parts[key]

    @property
    def numel(self) -> int:
        return self.flat.numel()

    @property
    def nbytes(self) -> int:
        return self.flat.numel() * self.flat.element_size()

    @property
    def windowed(self) -> bool:
        """Whether `rows` are windows of device memory, of which `flat` is one."""
        return bool(self.rows) and self.rows[0].device.type != "cpu"

    @property
    def own_row(self) -> Tensor:
        """The one of `rows` that is this rank's: `flat` or `host`."""
        return self.rows[self.world.local_rank]

    def extent(self, view: Tensor) -> tuple[int, int]:
        """Return the elements [start, stop) of `flat` that belong to one of `views`."""
        start = int(view.storage_offset()) - int(self.flat.storage_offset())
        return start, start + view.numel()

    def part(self, index: int, parts: int) -> slice:
        """Return slice number `index` of `parts` nearly equal ones, aligned to cache lines."""
        return aligned_part(self.flat, index, parts)

    def clear_gaps(self, part: slice) -> None:
        """Set the gaps between tensors to zero in a part of the bucket."""
        begin = 0
        for start, stop in [*map(self.extent, self.views), (self.numel, 0)]:
            first, last = max(begin, part.start), min(start, part.stop)
            if first < last:
                self.flat[first:last] = 0
            begin = stop

    def __str__(self) -> str:
        return f"bucket {self.index}"


class TensorGroup:
    """The tensors of a model as views of one flat buffer; the argument of every collective.

    Its communicated memory is shared by the ranks of a node, if available: host memory, or on a GPU windows
    of device memory.

    Parameters
    ----------
    world
        The ranks; all of them must create the same group.
    tensors
        (name, tensor) pairs, which define names, shapes, strides and dtypes (also mixed), and the order of
        communication.
    bucket_mib
        Size of a bucket in MiB; a larger tensor has a bucket of its own. Default 4.
    staged
        Whether the model's memory and the communicated memory are separate. Default: on a GPU, where the
        latter is pinned.

    Attributes
    ----------
    views
        One tensor a name, zero at the start, with the shape and strides of the model tensor. It lies in the
        buffer, and has a storage of its own.
    buckets
        The buckets, in the order of their last tensors. Each holds one dtype, of complex ones the real.

    Raises
    ------
    BadOption
        `bucket_mib` is not above 0.
    """

    @checked
    def __init__(
        self,
        world: World,
        tensors: Iterable[tuple[str, Tensor]],
        bucket_mib: BucketMib = DEFAULT_BUCKET_MIB,
        *,
        staged: bool | None = None,
    ) -> None:
        self.world = world
        templates = list(tensors)
        plans = _plan(templates, bucket_mib * 2**20)
        self.nbytes = sum(nbytes for _, nbytes in plans)
        staged = world.device.type != "cpu" if staged is None else staged
        windows = self._allocate_windows() if staged else None
        self._shared_rows = None if windows else self._allocate_shared_rows()
        if windows:
            host, memory, self._rows = None, windows[world.local_rank], windows
        else:
            host = self._host_memory()
            memory = torch.zeros_like(host, device=world.device) if staged else host
            rows = self._shared_rows.rows if self._shared_rows else ()
            self._rows = [torch.from_numpy(row) for row in rows]
        self.buckets: list[Bucket] = []
        offset = 0
        for index, (members, nbytes) in enumerate(plans):
            self.buckets.append(self._bucket(index, members, offset, nbytes, host, memory))
            offset += nbytes
        self._like = dict(templates)
        self._in_bucket = {
            name: view
            for bucket in self.buckets
            for name, view in zip(bucket.names, bucket.views, strict=True)
        }
        self.views = {name: self._view(name) for name in self._like}

    @property
    def staged(self) -> bool:
        """Whether the model's memory and host memory that is communicated are separate."""
        return any(bucket.staged for bucket in self.buckets)

    @property
    def shared(self) -> bool:
        """Whether the ranks of a node share their buffers, and some node has several; equal on all ranks."""
        return bool(self._rows) and self.world.max_local_size > 1

    def renew(self, name: str) -> Tensor:
        """Replace a view by a new one on the same memory, for one whose storage has moved; returns it."""
        self.views[name] = self._view(name)
        return self.views[name]

    def _view(self, name: str) -> Tensor:
        view = self._in_bucket[name]
        return with_own_storage(torch.view_as_complex(view) if self._like[name].is_complex() else view)

    def __len__(self) -> int:
        return len(self.buckets)

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self.buckets)

    # All ranks of the job take the same path: if one node has no such memory, no node uses it.

    def _allocate_windows(self) -> list[Tensor] | None:
        world = self.world
        if world.device.type == "cpu" or world.max_local_size == 1:
            return None
        windows = world.local.allocate_on_device(max(self.nbytes, ALIGNMENT), world.device)
        return windows if all(world.gather(windows is not None)) else None

    def _allocate_shared_rows(self) -> SharedMemory | None:
        shared_rows = self.world.local.allocate(max(self.nbytes, ALIGNMENT))
        return shared_rows if all(self.world.gather(shared_rows is not None)) else None

    def _host_memory(self) -> Tensor:
        if self._shared_rows is not None:
            row = self._shared_rows.row
            return registered(row) if self.world.device.type == "cuda" else torch.from_numpy(row)
        return pinned(max(self.nbytes, ALIGNMENT), self.world.device)

    def _bucket(
        self,
        index: int,
        members: list[tuple[str, Tensor]],
        offset: int,
        nbytes: int,
        host: Tensor | None,
        memory: Tensor,
    ) -> Bucket:
        dtype = _real_dtype(members[0][1])
        flat = memory[offset : offset + nbytes].view(dtype)
        views, position = [], 0
        for _, tensor in members:
            views.append(_view(flat, position, tensor))
            position += _aligned(tensor) // dtype.itemsize
        bucket = Bucket(
            self.world,
            index,
            [name for name, _ in members],
            views,
            flat,
            start=offset // dtype.itemsize,
            own_part=aligned_part(flat, self.world.local_rank, self.world.local_size),
        )
        if host is not None:
            part = host[offset : offset + nbytes]
            bucket.host_memory = flat if memory is host else part.view(dtype)
        if self.shared:
            bucket.rows = [row[offset : offset + nbytes].view(dtype) for row in self._rows]
            if dtype in _KERNEL_DTYPES and self._shared_rows is not None:
                bucket.matrix = self._shared_rows.rows.view(_KERNEL_DTYPES[dtype])
        return bucket


def aligned_part(flat: Tensor, index: int, parts: int) -> slice:
    """Return slice number `index` of `parts` nearly equal ones of a 1-D tensor, aligned to cache lines."""
    line = ALIGNMENT // flat.element_size()
    lines = -(-flat.numel() // line)
    first, last = lines * index // parts, lines * (index + 1) // parts
    return slice(min(first * line, flat.numel()), min(last * line, flat.numel()))


def _plan(
    templates: Sequence[tuple[str, Tensor]], limit: float
) -> list[tuple[list[tuple[str, Tensor]], int]]:
    """Return the members and bytes of each bucket, in the order in which a pass over tensors completes them.

    Tensors of each dtype fill buckets in the given order, however dtypes alternate.
    """
    plans: list[tuple[list[tuple[str, Tensor]], int]] = []
    last_positions: list[int] = []
    open_plan: dict[torch.dtype, int] = {}
    for position, (name, tensor) in enumerate(templates):
        nbytes, dtype = _aligned(tensor), _real_dtype(tensor)
        number = open_plan.get(dtype)
        if number is None or plans[number][1] + nbytes > limit:
            number = open_plan[dtype] = len(plans)
            plans.append(([], 0))
            last_positions.append(position)
        members, size = plans[number]
        members.append((name, tensor))
        plans[number], last_positions[number] = (members, size + nbytes), position
    return [plans[number] for number in sorted(range(len(plans)), key=last_positions.__getitem__)]


def _real_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def _aligned(tensor: Tensor) -> int:
    """Return the bytes that a tensor occupies in the buffer."""
    return -(tensor.numel() * tensor.element_size() // -ALIGNMENT) * ALIGNMENT


def _view(flat: Tensor, position: int, like: Tensor) -> Tensor:
    """Return the view of a bucket from an element on; complex tensors have their parts as last dimension."""
    # Dense, maybe channels_last: with the same strides autograd and optimizers keep their fast paths.
    strides = like.stride() if is_dense(like) else torch.empty(like.size(), device="meta").stride()
    start = int(flat.storage_offset()) + position
    if like.is_complex():
        return flat.as_strided((*like.size(), 2), (*(2 * stride for stride in strides), 1), start)
    return flat.as_strided(like.size(), strides, start)
