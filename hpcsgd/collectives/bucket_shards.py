"""Assignment of bucket slices to the ranks that compress them, with codecs, buffers and residuals."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcsgd.collectives.staging import wait_for_compute
from hpcsgd.compress.base import Codec, Compressor, Segment, dry_run
from hpcsgd.errors import BadOption
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.tensors.group import Bucket, TensorGroup
from hpcsgd.tensors.memory import pinned

_ONE_TENSOR_MIB = 1e-9  # so small that every buffer is a bucket of its own


@dataclass
class BucketShard:
    """The slice of a bucket that this rank compresses.

    Attributes
    ----------
    bucket
        The bucket.
    part
        The slice; empty if the rank owns none.
    codec
        Compresses the slice; None if the rank owns none.
    buffers
        One for each of `Codec.sum_buffers`.
    residual
        Error-feedback residual, (elements of the slice,) float32, or None.
    """

    bucket: Bucket
    part: slice
    codec: Codec | None
    buffers: list[Bucket]
    residual: Tensor | None
    _on_host: dict[tuple[torch.Size, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def values(self) -> Tensor:
        return self.bucket.flat[self.part]

    def to_host(self, message: Tensor) -> Tensor:
        """Return a message on the host, on a CPU itself; valid until the next one of its shape and dtype."""
        if message.device.type == "cpu":
            return message
        key = message.shape, message.dtype
        if key not in self._on_host:
            memory = pinned(message.nbytes, message.device)
            self._on_host[key] = memory.view(message.dtype).view(message.shape)
        copy = self._on_host[key].copy_(message, non_blocking=True)
        wait_for_compute(message.device)
        return copy

    def clear_gaps(self) -> None:
        """Set the gaps between tensors to zero, which nothing else does before the next reduction."""
        self.bucket.clear_gaps(self.part)


def make_shards(
    group: TensorGroup,
    algorithm: str,
    compressor: Compressor,
    communicator: Communicator | None,
    by_node: bool,
) -> tuple[list[BucketShard], TensorGroup]:
    """Create a shard for each bucket, and the group of their buffers; collective.

    Parameters
    ----------
    group, algorithm, compressor
        The group to be summed, the all-reduce algorithm, and the scheme.
    communicator
        The ranks whose codes are summed; None on a rank that owns no slice.
    by_node
        Whether each rank compresses a slice of its node's sum, or all of its own buckets.

    Raises
    ------
    BadOption
        The scheme does not fit the number of ranks or the algorithm.
    """
    total = sum(bucket.numel for bucket in group)
    shards = [_make_shard(bucket, compressor, communicator, by_node, total) for bucket in group]
    sums = [
        (f"{shard.bucket.index}.{index}", torch.empty(max(1, numel), dtype=dtype, device="cpu"))
        for shard in shards
        if shard.codec is not None
        for index, (numel, dtype) in enumerate(shard.codec.sum_buffers)
    ]
    if algorithm == "library" and any(buffer.element_size() < 4 for _, buffer in sums):
        raise BadOption(
            f"all-reduce algorithm 'library' does not fit {compressor}",
            got="half precision, which MPI cannot sum",
            do="for algorithm (--algorithm) use 'auto' or 'ring'",
            everywhere=True,
        )
    buffers = TensorGroup(group.world, sums, _ONE_TENSOR_MIB, staged=group.staged)
    for (name, _), buffer in zip(sums, buffers, strict=True):
        shards[int(name.partition(".")[0])].buffers.append(buffer)
    _warm_up(group, compressor, communicator)
    return shards, buffers


def locate_non_finite(shard: BucketShard, by_node: bool) -> tuple[int, str | None]:
    """Return the global rank and the tensor of a non-finite value in a shard; (this rank, None): none."""
    bucket, world = shard.bucket, shard.bucket.world
    # A node's sum replaces this rank's own row; the rows of the node's other ranks still hold their values.
    others = zip(world.local.members, bucket.rows, strict=True) if by_node else ()
    for rank, row in [*((r, row) for r, row in others if r != world.rank), (world.rank, bucket.flat)]:
        bad = torch.zeros(bucket.numel, dtype=torch.bool, device=row.device)
        bad[shard.part] = ~torch.isfinite(row[shard.part])
        for name, view in zip(bucket.names, bucket.views, strict=True):
            if bool(bad[slice(*bucket.extent(view))].any()):
                return world.all.ranks[rank], name
    return world.global_rank, None


def _make_shard(
    bucket: Bucket, compressor: Compressor, communicator: Communicator | None, by_node: bool, total: int
) -> BucketShard:
    world, part = bucket.world, slice(0, bucket.numel)
    if communicator is None:
        return BucketShard(bucket, slice(0, 0), None, [], None)
    if by_node:
        part = bucket.part(world.local_rank, world.rings)
    segment = _segment(bucket, part, communicator.size, total)
    residual = torch.zeros(segment.numel, device=segment.device) if compressor.feedback else None
    return BucketShard(bucket, part, compressor.codec(segment), [], residual)


def _segment(bucket: Bucket, part: slice, terms: int, total: int) -> Segment:
    numel, tensors = part.stop - part.start, []
    for view in bucket.views:
        start, stop = bucket.extent(view)
        if part.start <= start and stop <= part.stop:
            tensors.append((start - part.start, tuple(view.shape)))
    share = numel / total if total else 1.0
    return Segment(numel, terms, part.start, share, tuple(tensors), bucket.flat.device)


def _warm_up(group: TensorGroup, compressor: Compressor, communicator: Communicator | None) -> None:
    """Compile the kernels before anything is timed: one rank of a node does, the others load the result."""
    world = group.world
    variants = sorted({(b.flat.dtype, b.flat.device) for b in group}, key=str)
    for in_turn in (world.local_rank == 0, world.local_rank != 0):
        for dtype, device in variants if in_turn and communicator is not None else ():
            dry_run(compressor, Segment(1, communicator.size if communicator else 1, device=device), dtype)
        world.local.comm.barrier("the compilation of kernels")
