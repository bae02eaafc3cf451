"""Coordinates drawn without replacement: one from each of nearly equal stretches. See `spec`."""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.codec.float_bits import hashed
from hpcsgd.kernels.jit import jit


@jit
def coordinates(numel, count, key0, key1, first, last, indices, lengths):  # type: ignore[no-untyped-def]
    """Coordinates `first` to `last` of `count` out of `numel`, and the lengths of their stretches."""
    whole, part = numel // count, numel % count
    begin, rest = first * numel // count, first * numel % count
    for i in range(first, last):
        # What (i + 1) * numel // count comes to, without a division for each.
        rest += part
        carry = rest >= count
        rest -= count * carry
        length = np.uint64(whole + carry)
        draw = np.uint64(hashed(np.uint32(i), key0, key1))
        indices[i - first] = begin + np.int64((draw * length) >> np.uint64(32))
        lengths[i - first] = length
        begin += whole + carry
