"""Barrier of the ranks of a node, on flags in shared memory: spin, then yield, then sleep.

Ranks may outnumber cores, so a waiting rank spins for microseconds only, yields its core a few times, and
then sleeps on a futex until the last rank arrives. Arrival and waiting are separate calls, and a wait is
bounded in time, so that the caller can check its deadline in between.

Flags, int32, each on two cache lines of its own (`STRIDE` words): the number of ranks that have arrived;
the generation (number of completed barriers); the number of sleeping ranks; and for each rank the
generation of its last arrival, which identifies the missing ranks when a deadline ends the wait.
"""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sync import atomics

STRIDE = 32
_YIELDS = 20
_COUNT, _GENERATION, _SLEEPERS, _ARRIVED = 0, STRIDE, 2 * STRIDE, 3 * STRIDE


def flags_size(ranks: int) -> int:
    """Return the bytes of the flags of a barrier of `ranks`, to be initialised to zero."""
    return (3 + ranks) * STRIDE * 4


@jit
def arrive(flags, ranks, me):  # type: ignore[no-untyped-def]
    """Record the arrival of rank `me`; returns the generation that completes with the last arrival."""
    target = np.int32(atomics.load(flags, _GENERATION) + 1)
    atomics.store(flags, _ARRIVED + STRIDE * me, target)
    if atomics.add(flags, _COUNT, np.int32(1)) == ranks - 1:
        atomics.store(flags, _COUNT, np.int32(0))
        atomics.store(flags, _GENERATION, target)
        if atomics.load(flags, _SLEEPERS) != 0:
            atomics.futex_wake(flags, _GENERATION)
    return target


@jit
def wait(flags, target, spins, microseconds):  # type: ignore[no-untyped-def]
    """Wait until generation `target` is complete; returns False after `microseconds` without it."""
    for _ in range(spins):
        if np.int32(atomics.load(flags, _GENERATION) - target) >= 0:
            return True
    # A missing rank may be waiting for this very core.
    for _ in range(_YIELDS):
        atomics.yield_core()
        if np.int32(atomics.load(flags, _GENERATION) - target) >= 0:
            return True
    atomics.add(flags, _SLEEPERS, np.int32(1))
    seen = atomics.load(flags, _GENERATION)
    if np.int32(seen - target) < 0:
        atomics.futex_wait(flags, _GENERATION, seen, microseconds)
    atomics.add(flags, _SLEEPERS, np.int32(-1))
    return np.int32(atomics.load(flags, _GENERATION) - target) >= 0


def is_complete(flags: np.ndarray, target: int) -> bool:
    """Return whether generation `target` is complete, without waiting."""
    return bool(_is_complete(flags, target))


@jit
def _is_complete(flags, target):  # type: ignore[no-untyped-def]
    return np.int32(atomics.load(flags, _GENERATION) - target) >= 0


def missing_ranks(flags: np.ndarray, ranks: int, target: int) -> list[int]:
    """Return the ranks that have not yet arrived at generation `target`."""
    arrived = flags[_ARRIVED::STRIDE][:ranks]
    late = (arrived - np.int32(target)).astype(np.int32) < 0
    return [int(rank) for rank in np.nonzero(late)[0]]
