"""The barrier of a node's ranks: flags in shared memory; spin, then yield, then sleep.

Ranks may outnumber cores, so a waiting rank spins for microseconds only, gives its core to others a few
times, and then sleeps in the kernel until the last one arrives. Arriving and waiting are apart, and
waiting is bounded in time: between two waits the caller can look at its deadline.

Flags, int32, one per two cache lines (`STRIDE` words): how many have arrived, the generation (barriers
completed), how many sleep, and for each rank the generation at which it last arrived, which names the
missing ones when a deadline ends the wait.
"""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sync import atomics

STRIDE = 32
_YIELDS = 20
_COUNT, _GENERATION, _SLEEPERS, _ARRIVED = 0, STRIDE, 2 * STRIDE, 3 * STRIDE


def flags_size(ranks: int) -> int:
    """Bytes of flags that a barrier of `ranks` needs, zero at the start."""
    return (3 + ranks) * STRIDE * 4


@jit
def arrive(flags, ranks, me):  # type: ignore[no-untyped-def]
    """Say that rank `me` is here; returns the generation that completes when all are."""
    target = np.int32(atomics.load(flags, _GENERATION) + 1)
    atomics.store(flags, _ARRIVED + STRIDE * me, target)
    if atomics.add(flags, _COUNT, np.int32(1)) == ranks - 1:
        atomics.store(flags, _COUNT, np.int32(0))
        atomics.store(flags, _GENERATION, target)
        if atomics.load(flags, _SLEEPERS) != 0:
            atomics.wake(flags, _GENERATION)
    return target


@jit
def completed(flags, target, spins, microseconds):  # type: ignore[no-untyped-def]
    """Wait for generation `target`; False where `microseconds` passed without it."""
    for _ in range(spins):
        if np.int32(atomics.load(flags, _GENERATION) - target) >= 0:
            return True
    # Who is missing may be waiting for this very core.
    for _ in range(_YIELDS):
        atomics.give_way()
        if np.int32(atomics.load(flags, _GENERATION) - target) >= 0:
            return True
    atomics.add(flags, _SLEEPERS, np.int32(1))
    seen = atomics.load(flags, _GENERATION)
    if np.int32(seen - target) < 0:
        atomics.sleep_while(flags, _GENERATION, seen, microseconds)
    atomics.add(flags, _SLEEPERS, np.int32(-1))
    return np.int32(atomics.load(flags, _GENERATION) - target) >= 0


def passed(flags: np.ndarray, target: int) -> bool:
    """Whether generation `target` is complete, without waiting for it."""
    return bool(_passed(flags, target))


@jit
def _passed(flags, target):  # type: ignore[no-untyped-def]
    return np.int32(atomics.load(flags, _GENERATION) - target) >= 0


def missing(flags: np.ndarray, ranks: int, target: int) -> list[int]:
    """The ranks that have not yet arrived at generation `target`."""
    arrived = flags[_ARRIVED::STRIDE][:ranks]
    late = (arrived - np.int32(target)).astype(np.int32) < 0
    return [int(rank) for rank in np.nonzero(late)[0]]
