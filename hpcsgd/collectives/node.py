"""Collectives inside a node: ranks read and write each other's buffers in place."""

from __future__ import annotations

import functools
from typing import Any

import torch

from hpcsgd.mpi.world import SLICE_OF_WAIT
from hpcsgd.tensors.group import Bucket

_CHUNK = 64 * 1024  # elements of half precision that are summed at a time, in the second-level cache


def allreduce(bucket: Bucket, what: str, scale: float) -> None:
    """Each rank reduces one part of the bucket, for all ranks, straight into their buffers.

    No copy and no message: the memory sees every buffer read once and written once. A bucket of a few
    KiB is instead copied where all can read it, and each rank adds up the whole: one barrier, not two.
    """
    world, matrix = bucket.world, bucket.matrix
    if matrix is None:
        world.node_barrier(what)
        reduce(bucket, bucket.mine, scale, to_all=True)
        world.node_barrier(what)
        return
    kernel = _kernel()
    start, me, factor = bucket.start, world.local_rank, matrix.dtype.type(scale)
    phase, target = kernel.ENTER, 0
    slots = world.next_slots(bucket.nbytes, matrix.dtype)
    if slots is not None:
        world.traffic.shared += (world.local_size - 1) * bucket.nbytes
        run = kernel.allreduce_small
        arguments: tuple[Any, ...] = (slots, matrix, start, start + bucket.numel, factor, me)
    else:
        _count(bucket, bucket.mine, 2)
        run, part = kernel.allreduce, bucket.mine
        arguments = (matrix, start + part.start, start + part.stop, factor, me)

    def done() -> bool:
        nonlocal phase, target
        phase, target = run(phase, target, world.flags, *arguments, world.spins, SLICE_OF_WAIT)
        return bool(phase == kernel.DONE)

    world.waiter.until(done, what, lambda: world.missing_on_node(target))


def broadcast(bucket: Bucket, what: str, root: int) -> None:
    """Each rank copies the root's bucket."""
    world = bucket.world
    world.node_barrier(what)
    source = world.members.index(root)
    if source != world.local_rank:
        world.traffic.shared += bucket.nbytes
        bucket.host.copy_(bucket.rows[source])
    world.node_barrier(what)


def reduce_scatter(bucket: Bucket, what: str, scale: float) -> None:
    """Each rank reduces its part into its own buffer."""
    world, part = bucket.world, bucket.mine
    world.node_barrier(what)
    reduce(bucket, part, scale, to_all=False)
    world.node_barrier(what)


def allgather(bucket: Bucket, what: str) -> None:
    """Each rank writes its part into all buffers."""
    world = bucket.world
    world.node_barrier(what)
    spread(bucket, bucket.mine)
    world.node_barrier(what)


def reduce(bucket: Bucket, part: slice, scale: float, *, to_all: bool) -> None:
    """Between two barriers: this rank's part becomes `scale` times the sum over the node.

    Parameters
    ----------
    to_all
        Write the result into every rank's buffer, or into this rank's alone.
    """
    world = bucket.world
    _count(bucket, part, 2 if to_all else 1)
    if bucket.matrix is None:
        _reduce_half(bucket, part, scale, bucket.rows if to_all else [bucket.host])
        return

    kernel = _kernel()
    start, stop = bucket.start + part.start, bucket.start + part.stop
    factor = bucket.matrix.dtype.type(scale)
    if to_all:
        kernel.reduce_part_to_all(bucket.matrix, start, stop, factor)
    else:
        kernel.reduce_part(bucket.matrix, start, stop, factor, world.local_rank)


def spread(bucket: Bucket, part: slice) -> None:
    """Between two barriers: write this rank's part into the buffers of the node's other ranks."""
    _count(bucket, part, 1)
    world = bucket.world
    for rank, row in enumerate(bucket.rows):
        if rank != world.local_rank:
            row[part] = bucket.host[part]


def _reduce_half(bucket: Bucket, part: slice, scale: float, targets: list[torch.Tensor]) -> None:
    """Half precision, summed in float32."""
    for start in range(part.start, part.stop, _CHUNK):
        piece = slice(start, min(start + _CHUNK, part.stop))
        total = bucket.rows[0][piece].float()
        for row in bucket.rows[1:]:
            total += row[piece]
        total *= scale
        for target in targets:
            target[piece] = total


@functools.cache
def _kernel() -> Any:
    # Imported late, for numba's sake, and once, for this is on the path of a few microseconds.
    from hpcsgd.kernels.sums import node_reduce as kernel

    return kernel


def _count(bucket: Bucket, part: slice, passes: int) -> None:
    """Count a part of the other ranks' buffers that is read, or written, or both (2 passes)."""
    world = bucket.world
    nbytes = (part.stop - part.start) * bucket.flat.element_size()
    world.traffic.shared += passes * (world.local_size - 1) * nbytes
