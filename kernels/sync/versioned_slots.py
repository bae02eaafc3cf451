"""Flags of versioned slots in shared memory: the version in each slot, and its remaining readers.

A peer has two slots. It fills the one without readers and publishes its version; a reader waits until one
of the two holds the version it needs, reads it, and releases the slot. A slot is thus never overwritten
while it is read, and a reader never gets another version than the requested one.

Words of a peer, int32, each on cache lines of its own (`STRIDE` words): the number of changes, on which
waiters sleep; the number of sleeping waiters; then for each slot its version and its number of readers.
"""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sync import atomics

SLOTS = 2
STRIDE = 32
_YIELDS = 20
_CHANGES, _SLEEPERS, _VERSION, _READERS = 0, STRIDE, 2 * STRIDE, 3 * STRIDE
_WORDS = (2 + 2 * SLOTS) * STRIDE


def flags_size(peers: int) -> int:
    """Return the bytes of the flags of `peers`, to be initialised to zero."""
    return peers * _WORDS * 4


@jit
def _at(peer, slot, word):  # type: ignore[no-untyped-def]
    return peer * _WORDS + word + 2 * STRIDE * slot


@jit
def _changed(flags, peer):  # type: ignore[no-untyped-def]
    atomics.add(flags, peer * _WORDS + _CHANGES, np.int32(1))
    if atomics.load(flags, peer * _WORDS + _SLEEPERS) != 0:
        atomics.futex_wake(flags, peer * _WORDS + _CHANGES)


@jit
def publish(flags, peer, slot, version, readers):  # type: ignore[no-untyped-def]
    """Publish that a slot holds a version (above 0) for a number of readers."""
    atomics.store(flags, _at(peer, slot, _READERS), np.int32(readers))
    atomics.store(flags, _at(peer, slot, _VERSION), np.int32(version))
    _changed(flags, peer)


@jit
def release(flags, peer, slot):  # type: ignore[no-untyped-def]
    """Remove one reader from a slot."""
    if atomics.add(flags, _at(peer, slot, _READERS), np.int32(-1)) == 1:
        _changed(flags, peer)


@jit
def holds_version(flags, peer, slot, version):  # type: ignore[no-untyped-def]
    """Return whether a slot holds a version."""
    return atomics.load(flags, _at(peer, slot, _VERSION)) == version


@jit
def _slot_with(flags, peer, version):  # type: ignore[no-untyped-def]
    for slot in range(SLOTS):
        if holds_version(flags, peer, slot, version):
            return slot
    return -1


@jit
def _is_free(flags, peer, slot):  # type: ignore[no-untyped-def]
    return atomics.load(flags, _at(peer, slot, _READERS)) == 0


@jit
def wait_for_version(flags, peer, version, spins, microseconds):  # type: ignore[no-untyped-def]
    """Wait for a version and return its slot; -1 after `microseconds` without it."""
    for attempt in range(spins + _YIELDS):
        slot = _slot_with(flags, peer, version)
        if slot >= 0:
            return slot
        if attempt >= spins:
            atomics.yield_core()
    _begin_sleep(flags, peer)
    seen = atomics.load(flags, peer * _WORDS + _CHANGES)
    if _slot_with(flags, peer, version) < 0:
        atomics.futex_wait(flags, peer * _WORDS + _CHANGES, seen, microseconds)
    _end_sleep(flags, peer)
    return _slot_with(flags, peer, version)


@jit
def wait_until_free(flags, peer, slot, spins, microseconds):  # type: ignore[no-untyped-def]
    """Wait, at most `microseconds`, until a slot has no readers left; False: it still has."""
    for attempt in range(spins + _YIELDS):
        if _is_free(flags, peer, slot):
            return True
        if attempt >= spins:
            atomics.yield_core()
    _begin_sleep(flags, peer)
    seen = atomics.load(flags, peer * _WORDS + _CHANGES)
    if not _is_free(flags, peer, slot):
        atomics.futex_wait(flags, peer * _WORDS + _CHANGES, seen, microseconds)
    _end_sleep(flags, peer)
    return _is_free(flags, peer, slot)


@jit
def _begin_sleep(flags, peer):  # type: ignore[no-untyped-def]
    atomics.add(flags, peer * _WORDS + _SLEEPERS, np.int32(1))


@jit
def _end_sleep(flags, peer):  # type: ignore[no-untyped-def]
    atomics.add(flags, peer * _WORDS + _SLEEPERS, np.int32(-1))
