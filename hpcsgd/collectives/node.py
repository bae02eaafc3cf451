"""Collectives within a node: ranks read and write each other's buffers in place.

They lie in shared memory of the host, or in windows of device memory. There the ranks wait for each other by
the same flags, once their device has done what is queued. Not inside of kernels: those of several processes
on one GPU run in turns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from hpcsgd.collectives.staging import wait_for_compute
from hpcsgd.mpi.node import NATIVE_WAIT_SLICE
from hpcsgd.mpi.tasks import Steps, Wait
from hpcsgd.tensors.group import Bucket

_CHUNK = 64 * 1024  # elements of half precision that are summed at a time: they fit the second-level cache


def allreduce(bucket: Bucket, scale: float) -> Steps[None]:
    """All-reduce: each rank reduces one part of the bucket, directly into the buffers of all ranks.

    Needs no copy and no message: every buffer is read once and written once. A bucket of a few KiB is copied
    to slots that all ranks read, and each rank sums all of it: one barrier instead of two.
    """
    world, matrix = bucket.world, bucket.matrix
    if matrix is None:
        yield barrier(bucket)
        reduce(bucket, bucket.own_part, scale, to_all=True)
        yield barrier(bucket)
        return
    kernel = _kernel()
    start, me, factor = bucket.start, world.local_rank, matrix.dtype.type(scale)
    phase, target = kernel.ENTER, 0
    slots = world.local.next_slots(bucket.nbytes, matrix.dtype)
    if slots is not None:
        world.traffic.count(shared=(world.local_size - 1) * bucket.nbytes)
        run = kernel.allreduce_small
        arguments: tuple[Any, ...] = (slots, matrix, start, start + bucket.numel, factor, me)
    else:
        _count_traffic(bucket, bucket.own_part, 2)
        run, part = kernel.allreduce, bucket.own_part
        arguments = (matrix, start + part.start, start + part.stop, factor, me)

    local = world.local

    def done() -> bool:
        nonlocal phase, target
        phase, target = run(phase, target, local.flags, *arguments, local.spins, NATIVE_WAIT_SLICE)
        return bool(phase == kernel.DONE)

    yield Wait(done, lambda: local.missing(target))


def broadcast(bucket: Bucket, root: int) -> Steps[None]:
    """Broadcast: each rank copies the bucket of the root."""
    world = bucket.world
    yield barrier(bucket)
    source = world.local.members.index(root)
    if source != world.local_rank:
        world.traffic.count(shared=bucket.nbytes)
        bucket.own_row.copy_(bucket.rows[source])
    yield barrier(bucket)


def reduce_scatter(bucket: Bucket, scale: float) -> Steps[None]:
    """Reduce-scatter: each rank reduces its part into its own buffer."""
    yield barrier(bucket)
    reduce(bucket, bucket.own_part, scale, to_all=False)
    yield barrier(bucket)


def allgather(bucket: Bucket) -> Steps[None]:
    """All-gather: each rank writes its part into all buffers."""
    yield barrier(bucket)
    copy_to_node(bucket, bucket.own_part)
    yield barrier(bucket)


def barrier(bucket: Bucket) -> Wait:
    """Arrive at a barrier of the node's ranks, once the current stream of the device has done what is queued.

    Returns the wait for the other ranks.
    """
    if bucket.windowed:
        wait_for_compute(bucket.flat.device)
    return bucket.world.local.arrive()


def reduce(bucket: Bucket, part: slice, scale: float, *, to_all: bool) -> None:
    """Set a part to `scale` times its sum over the node; to be called between two barriers.

    Parameters
    ----------
    bucket
        The bucket, with rows of all ranks of the node.
    part
        The part that this rank reduces.
    scale
        Factor of the sum.
    to_all
        Whether the result is written into the buffers of all ranks, or only into this rank's.
    """
    world = bucket.world
    _count_traffic(bucket, part, 2 if to_all else 1)
    targets = bucket.rows if to_all else [bucket.own_row]
    if bucket.windowed:
        from hpcsgd.kernels.sums import device_sums

        device_sums.reduce_rows(bucket.rows, targets, part.start, part.stop, scale)
        return
    if bucket.matrix is None:
        _reduce_half(bucket, part, scale, targets)
        return

    kernel = _kernel()
    start, stop = bucket.start + part.start, bucket.start + part.stop
    factor = bucket.matrix.dtype.type(scale)
    if to_all:
        kernel.reduce_part_to_all(bucket.matrix, start, stop, factor)
    else:
        kernel.reduce_part(bucket.matrix, start, stop, factor, world.local_rank)


def copy_to_node(bucket: Bucket, part: slice) -> None:
    """Copy a part into the buffers of the node's other ranks; to be called between two barriers."""
    _count_traffic(bucket, part, 1)
    world = bucket.world
    for rank, row in enumerate(bucket.rows):
        if rank != world.local_rank:
            row[part] = bucket.own_row[part]


def _reduce_half(bucket: Bucket, part: slice, scale: float, targets: list[torch.Tensor]) -> None:
    """Sum half precision in float32."""
    for start in range(part.start, part.stop, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, part.stop))
        total = bucket.rows[0][chunk].float()
        for row in bucket.rows[1:]:
            total += row[chunk]
        total *= scale
        for target in targets:
            target[chunk] = total


@functools.cache
def _kernel() -> Any:
    # Imported late, because numba is slow to import, and once, because a small all-reduce takes microseconds.
    from hpcsgd.kernels.sums import node_reduce as kernel

    return kernel


def _count_traffic(bucket: Bucket, part: slice, passes: int) -> None:
    """Count the bytes of the other ranks' buffers that are read, or written, or both (2 passes)."""
    world = bucket.world
    nbytes = (part.stop - part.start) * bucket.flat.element_size()
    world.traffic.count(shared=passes * (world.local_size - 1) * nbytes)
