"""Flags of slots in shared memory: which version each holds, and how many have still to read it.

A peer has two slots. It fills the one that nobody reads any more, and says which version it now holds; a
reader waits until one of the two holds the version it wants, reads, and lets go. So a slot is never
overwritten while it is read, and nobody ever reads another version than the one meant.

Words of a peer, int32, each on cache lines of its own (`STRIDE` words): how often anything changed, on
which all sleep; how many sleep; then for each slot its version and its readers.
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
    """Bytes of flags of so many peers, zero at the start."""
    return peers * _WORDS * 4


@jit
def _at(peer, slot, word):  # type: ignore[no-untyped-def]
    return peer * _WORDS + word + 2 * STRIDE * slot


@jit
def _changed(flags, peer):  # type: ignore[no-untyped-def]
    atomics.add(flags, peer * _WORDS + _CHANGES, np.int32(1))
    if atomics.load(flags, peer * _WORDS + _SLEEPERS) != 0:
        atomics.wake(flags, peer * _WORDS + _CHANGES)


@jit
def publish(flags, peer, slot, version, readers):  # type: ignore[no-untyped-def]
    """Say that a slot has been filled with a version, above 0, for so many readers."""
    atomics.store(flags, _at(peer, slot, _READERS), np.int32(readers))
    atomics.store(flags, _at(peer, slot, _VERSION), np.int32(version))
    _changed(flags, peer)


@jit
def release(flags, peer, slot):  # type: ignore[no-untyped-def]
    """Say that one reader of a slot has read it."""
    if atomics.add(flags, _at(peer, slot, _READERS), np.int32(-1)) == 1:
        _changed(flags, peer)


@jit
def holds(flags, peer, slot, version):  # type: ignore[no-untyped-def]
    """Whether a slot holds a version."""
    return atomics.load(flags, _at(peer, slot, _VERSION)) == version


@jit
def _holder(flags, peer, version):  # type: ignore[no-untyped-def]
    for slot in range(SLOTS):
        if holds(flags, peer, slot, version):
            return slot
    return -1


@jit
def _free(flags, peer, slot):  # type: ignore[no-untyped-def]
    return atomics.load(flags, _at(peer, slot, _READERS)) == 0


@jit
def find(flags, peer, version, spins, microseconds):  # type: ignore[no-untyped-def]
    """The slot that holds a version; -1 where `microseconds` passed without one."""
    for turn in range(spins + _YIELDS):
        slot = _holder(flags, peer, version)
        if slot >= 0:
            return slot
        if turn >= spins:
            atomics.give_way()
    _nap_begins(flags, peer)
    seen = atomics.load(flags, peer * _WORDS + _CHANGES)
    if _holder(flags, peer, version) < 0:
        atomics.sleep_while(flags, peer * _WORDS + _CHANGES, seen, microseconds)
    _nap_ends(flags, peer)
    return _holder(flags, peer, version)


@jit
def wait_until_free(flags, peer, slot, spins, microseconds):  # type: ignore[no-untyped-def]
    """Whether all have read a slot; waits for `microseconds` at most."""
    for turn in range(spins + _YIELDS):
        if _free(flags, peer, slot):
            return True
        if turn >= spins:
            atomics.give_way()
    _nap_begins(flags, peer)
    seen = atomics.load(flags, peer * _WORDS + _CHANGES)
    if not _free(flags, peer, slot):
        atomics.sleep_while(flags, peer * _WORDS + _CHANGES, seen, microseconds)
    _nap_ends(flags, peer)
    return _free(flags, peer, slot)


@jit
def _nap_begins(flags, peer):  # type: ignore[no-untyped-def]
    atomics.add(flags, peer * _WORDS + _SLEEPERS, np.int32(1))


@jit
def _nap_ends(flags, peer):  # type: ignore[no-untyped-def]
    atomics.add(flags, peer * _WORDS + _SLEEPERS, np.int32(-1))
