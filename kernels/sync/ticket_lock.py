"""Monotonic counts in shared memory, and a ticket lock built on one; waiters spin, yield, then sleep.

Words, int32, each on cache lines of its own (`STRIDE` words). A count has its value and the number of
sleeping waiters; a lock has the next ticket and the count of tickets that have been served.
"""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sync import atomics

STRIDE = 32
COUNT_WORDS = 2 * STRIDE
LOCK_WORDS = STRIDE + COUNT_WORDS
_YIELDS = 20


@jit
def set_count(words, at, value):  # type: ignore[no-untyped-def]
    """Set the count at word `at` and wake its waiters; one writer at a time."""
    atomics.store(words, at, np.int32(value))
    if atomics.load(words, at + STRIDE) != 0:
        atomics.futex_wake(words, at)


@jit
def _is_reached(words, at, target):  # type: ignore[no-untyped-def]
    return np.int32(atomics.load(words, at) - np.int32(target)) >= 0


@jit
def wait_for_count(words, at, target, spins, microseconds):  # type: ignore[no-untyped-def]
    """Wait, at most `microseconds`, until the count at word `at` is `target` or more; False: it is not."""
    for attempt in range(spins + _YIELDS):
        if _is_reached(words, at, target):
            return True
        if attempt >= spins:
            # The awaited process may need this very core.
            atomics.yield_core()
    atomics.add(words, at + STRIDE, np.int32(1))
    seen = atomics.load(words, at)
    if np.int32(seen - np.int32(target)) < 0:
        atomics.futex_wait(words, at, seen, microseconds)
    atomics.add(words, at + STRIDE, np.int32(-1))
    return _is_reached(words, at, target)


@jit
def take_ticket(words, at):  # type: ignore[no-untyped-def]
    """Take a ticket for the lock at word `at`, to be passed to `acquire` and `release`."""
    return atomics.add(words, at, np.int32(1))


@jit
def acquire(words, at, ticket, spins, microseconds):  # type: ignore[no-untyped-def]
    """Wait, at most `microseconds`, until the lock is held by a ticket; False: it is not yet."""
    return wait_for_count(words, at + STRIDE, ticket, spins, microseconds)


@jit
def release(words, at, ticket):  # type: ignore[no-untyped-def]
    """Pass the lock to the next ticket."""
    set_count(words, at + STRIDE, np.int32(ticket + np.int32(1)))
