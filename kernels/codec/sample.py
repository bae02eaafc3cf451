"""Random coordinates without replacement: one from each of nearly equal intervals. See `spec`."""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.codec.float_bits import hash32
from hpcsgd.kernels.jit import jit


@jit
def coordinates(numel, count, key0, key1, first, last, indices, lengths):  # type: ignore[no-untyped-def]
    """Write coordinates `first` to `last` of `count` out of `numel`, and the lengths of their intervals."""
    quotient, remainder = numel // count, numel % count
    begin, rest = first * numel // count, first * numel % count
    for i in range(first, last):
        # The interval ends at (i + 1) * numel // count, computed without a division for each i.
        rest += remainder
        carry = rest >= count
        rest -= count * carry
        length = np.uint64(quotient + carry)
        bits = np.uint64(hash32(np.uint32(i), key0, key1))
        indices[i - first] = begin + np.int64((bits * length) >> np.uint64(32))
        lengths[i - first] = length
        begin += quotient + carry
