"""Which part of each bucket a rank compresses, and the memory for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcsgd.compress import Codec, Compressor, Stretch
from hpcsgd.compress.base import dry_run
from hpcsgd.errors import BadOption
from hpcsgd.mpi.communicator import Transport
from hpcsgd.tensors.group import Bucket, TensorGroup

_ONE_EACH = 1e-9  # MiB: every buffer is a bucket of its own


@dataclass
class Lane:
    """The part of a bucket that this rank compresses.

    Attributes
    ----------
    part
        Its elements.
    codec
        None where the rank owns no part.
    buffers
        What the codec has summed.
    residual
        The memory of error feedback.
    """

    bucket: Bucket
    part: slice
    codec: Codec | None
    buffers: list[Bucket]
    residual: Tensor | None

    @property
    def values(self) -> Tensor:
        return self.bucket.flat[self.part]

    def clear_gaps(self) -> None:
        """Make the gaps between tensors zero again: nobody else writes there before the next reduction."""
        self.bucket.clear_gaps(self.part)


def make_lanes(
    group: TensorGroup, algorithm: str, compressor: Compressor, net: Transport | None, by_node: bool
) -> tuple[list[Lane], TensorGroup]:
    """A lane for each bucket, and the group of their buffers; collective.

    Parameters
    ----------
    group, algorithm, compressor
        What is summed, and how.
    net
        The ranks whose codes are added; None for a rank that owns no slice.
    by_node
        Whether each rank owns a slice of a node's sum, or the whole of its own buckets.

    Raises
    ------
    BadOption
        Where the scheme does not fit the number of ranks or the algorithm.
    """
    total = sum(bucket.numel for bucket in group)
    lanes = [_lane(bucket, compressor, net, by_node, total) for bucket in group]
    sums = [
        (f"{lane.bucket.index}.{slot}", torch.empty(max(1, numel), dtype=dtype))
        for lane in lanes
        if lane.codec is not None
        for slot, (numel, dtype) in enumerate(lane.codec.sums)
    ]
    if algorithm == "library" and any(buffer.element_size() < 4 for _, buffer in sums):
        raise BadOption(
            f"all-reduce algorithm 'library' does not fit {compressor}",
            got="half precision, which MPI cannot add",
            do="use 'auto' or 'ring'",
            everywhere=True,
        )
    buffers = TensorGroup(group.world, sums, _ONE_EACH, staged=False if by_node else None)
    for (name, _), buffer in zip(sums, buffers, strict=True):
        lanes[int(name.partition(".")[0])].buffers.append(buffer)
    _warm_up(group, compressor, net)
    return lanes, buffers


def place_of(lane: Lane, by_node: bool) -> tuple[int, str | None]:
    """The rank in the job and the tensor where a number of the lane is not finite; None: all are finite."""
    bucket, world = lane.bucket, lane.bucket.world
    # Of a node's sum, which is in this rank's own row, the other ranks' numbers are still there.
    others = zip(world.members, bucket.rows, strict=True) if by_node else ()
    for rank, row in [*((r, row) for r, row in others if r != world.rank), (world.rank, bucket.flat)]:
        bad = torch.zeros(bucket.numel, dtype=torch.bool, device=row.device)
        bad[lane.part] = ~torch.isfinite(row[lane.part])
        for name, view in zip(bucket.names, bucket.views, strict=True):
            if bool(bad[slice(*bucket.extent(view))].any()):
                return world.all.ranks[rank], name
    return world.name, None


def _lane(bucket: Bucket, compressor: Compressor, net: Transport | None, by_node: bool, total: int) -> Lane:
    world, part = bucket.world, slice(0, bucket.numel)
    if net is None:
        return Lane(bucket, slice(0, 0), None, [], None)
    if by_node:
        part = bucket.part(world.local_rank, world.lanes)
    stretch = _stretch(bucket, part, net.size, total)
    residual = torch.zeros(stretch.numel, device=stretch.device) if compressor.feedback else None
    return Lane(bucket, part, compressor.codec(stretch), [], residual)


def _stretch(bucket: Bucket, part: slice, terms: int, total: int) -> Stretch:
    size, inside = part.stop - part.start, []
    for view in bucket.views:
        start, stop = bucket.extent(view)
        if part.start <= start and stop <= part.stop:
            inside.append((start - part.start, tuple(view.shape)))
    share = size / total if total else 1.0
    return Stretch(size, terms, part.start, share, tuple(inside), bucket.flat.device)


def _warm_up(group: TensorGroup, compressor: Compressor, net: Transport | None) -> None:
    """Compile the kernels before anything is timed: one rank of a node, the others find the result."""
    world = group.world
    kinds = sorted({(b.flat.dtype, b.flat.device) for b in group}, key=str)
    for turn in (world.local_rank == 0, world.local_rank != 0):
        for dtype, device in kinds if turn and net is not None else ():
            dry_run(compressor, Stretch(1, net.size if net else 1, device=device), dtype)
        world.node_transport.barrier("the compilation of kernels")
