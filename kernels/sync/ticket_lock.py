"""Counts in shared memory that only grow, and a lock made of two: who waits for a value sleeps.

Words, int32, each on cache lines of its own (`STRIDE` words): a count is its value and how many sleep; a
lock is the tickets that were drawn and the count of those that have been served.
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
def advance(words, at, value):  # type: ignore[no-untyped-def]
    """Let the count at word `at` have a value; one writer at a time."""
    atomics.store(words, at, np.int32(value))
    if atomics.load(words, at + STRIDE) != 0:
        atomics.wake(words, at)


@jit
def _has(words, at, target):  # type: ignore[no-untyped-def]
    return np.int32(atomics.load(words, at) - np.int32(target)) >= 0


@jit
def reached(words, at, target, spins, microseconds):  # type: ignore[no-untyped-def]
    """Whether the count at word `at` is `target` or more; waits for `microseconds` at most."""
    for turn in range(spins + _YIELDS):
        if _has(words, at, target):
            return True
        if turn >= spins:
            # Who is awaited may need this very core.
            atomics.give_way()
    atomics.add(words, at + STRIDE, np.int32(1))
    seen = atomics.load(words, at)
    if np.int32(seen - np.int32(target)) < 0:
        atomics.sleep_while(words, at, seen, microseconds)
    atomics.add(words, at + STRIDE, np.int32(-1))
    return _has(words, at, target)


@jit
def draw(words, at):  # type: ignore[no-untyped-def]
    """A ticket for the lock at word `at`, which is then to be waited for (`mine`)."""
    return atomics.add(words, at, np.int32(1))


@jit
def mine(words, at, ticket, spins, microseconds):  # type: ignore[no-untyped-def]
    """Whether the lock is now that of a ticket; waits for `microseconds` at most."""
    return reached(words, at + STRIDE, ticket, spins, microseconds)


@jit
def leave(words, at, ticket):  # type: ignore[no-untyped-def]
    """Give the lock to the next ticket."""
    advance(words, at + STRIDE, np.int32(ticket + np.int32(1)))
