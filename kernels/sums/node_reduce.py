"""Sums over the rows of a shared matrix: row r is the buffer of local rank r.

Every kernel processes its part in blocks that stay in the first-level cache: each row is read once and
written once, in long streams, whatever the number of rows. Rows are added in rank order, so the result
depends on the input alone, and the owner of a part writes it for all ranks: all hold identical bits.
There are at least two rows.
"""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sync import barrier

_BLOCK = 512  # elements: 2 KiB of float32, a fraction of any first-level cache

ENTER, WAIT_ALL_READY, REDUCE, WAIT_ALL_REDUCED, DONE = range(5)


@jit
def _sum_block(rows, start, stop, scale, block):  # type: ignore[no-untyped-def]
    size, last = stop - start, rows.shape[0] - 1
    first, second = rows[0, start:stop], rows[1, start:stop]
    if last == 1:
        for i in range(size):
            block[i] = (first[i] + second[i]) * scale
        return
    for i in range(size):
        block[i] = first[i] + second[i]
    for rank in range(2, last):
        row = rows[rank, start:stop]
        for i in range(size):
            block[i] += row[i]
    # The last row is added and scaled in one pass: a pass of its own is a fifth of the time at two ranks.
    row = rows[last, start:stop]
    for i in range(size):
        block[i] = (block[i] + row[i]) * scale


@jit
def reduce_part(rows, start, stop, scale, me):  # type: ignore[no-untyped-def]
    """Set row `me` [start, stop) to `scale` times the sum of all rows there."""
    block = np.empty(_BLOCK, rows.dtype)
    for s in range(start, stop, _BLOCK):
        e = min(s + _BLOCK, stop)
        _sum_block(rows, s, e, scale, block)
        row = rows[me, s:e]
        for i in range(e - s):
            row[i] = block[i]


@jit
def reduce_part_to_all(rows, start, stop, scale):  # type: ignore[no-untyped-def]
    """Set all rows [start, stop) to `scale` times their sum."""
    block = np.empty(_BLOCK, rows.dtype)
    for s in range(start, stop, _BLOCK):
        e = min(s + _BLOCK, stop)
        _sum_block(rows, s, e, scale, block)
        for rank in range(rows.shape[0]):
            row = rows[rank, s:e]
            for i in range(e - s):
                row[i] = block[i]


@jit
def allreduce(  # type: ignore[no-untyped-def]
    phase, target, flags, rows, start, stop, scale, me, spins, microseconds
):
    """All-reduce the rows; [start, stop) is the part that rank `me` reduces for all ranks.

    Two barriers and the reduction in one call, so that a small bucket costs one call from Python. If a
    barrier is not complete within `microseconds`, the call returns the phase to resume from.

    Returns
    -------
    (phase, target)
        `DONE`, or the phase and barrier generation to pass to the next call.
    """
    ranks = rows.shape[0]
    if phase == ENTER:
        target = barrier.arrive(flags, ranks, me)
        phase = WAIT_ALL_READY
    if phase == WAIT_ALL_READY:
        if not barrier.wait(flags, target, spins, microseconds):
            return phase, target
        phase = REDUCE
    if phase == REDUCE:
        reduce_part_to_all(rows, start, stop, scale)
        target = barrier.arrive(flags, ranks, me)
        phase = WAIT_ALL_REDUCED
    if not barrier.wait(flags, target, spins, microseconds):
        return phase, target
    return DONE, target


@jit
def allreduce_small(  # type: ignore[no-untyped-def]
    phase, target, flags, slots, rows, start, stop, scale, me, spins, microseconds
):
    """All-reduce [start, stop) of row `me` by way of `slots` (ranks, elements), which all ranks read.

    As `allreduce`, but with one barrier: each rank sums all slots itself, in rank order.
    """
    ranks, size = rows.shape[0], stop - start
    row = rows[me, start:stop]
    if phase == ENTER:
        slot = slots[me]
        for i in range(size):
            slot[i] = row[i]
        target = barrier.arrive(flags, ranks, me)
        phase = WAIT_ALL_READY
    if not barrier.wait(flags, target, spins, microseconds):
        return phase, target
    first, second = slots[0], slots[1]
    for i in range(size):
        row[i] = first[i] + second[i]
    for rank in range(2, ranks):
        slot = slots[rank]
        for i in range(size):
            row[i] += slot[i]
    for i in range(size):
        row[i] *= scale
    return DONE, target


def warm_up() -> None:
    """Compile the kernels of a float32 all-reduce, or load them from the cache, before anything is timed."""
    flags = np.zeros(barrier.flags_size(2) // 4, np.int32)
    rows = np.zeros((2, 1), np.float32)
    reduce_part(rows, 0, 1, np.float32(1), 0)
    reduce_part_to_all(rows, 0, 1, np.float32(1))
    barrier.wait(flags, int(barrier.arrive(flags, 2, 0)), 0, 0)
    allreduce(ENTER, 0, flags, rows, 0, 1, np.float32(1), 1, 0, 0)
    allreduce_small(ENTER, 0, flags, rows, rows, 0, 1, np.float32(1), 1, 0, 0)
