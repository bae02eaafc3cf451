"""Updates of a parameter server: one pass over its values and the pushes of its clients.

Pushes are given as addresses of arrays like the values, in the order in which they are added.
"""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sums.weighted_sum import carray, pointer

_BLOCK = 2048  # elements that are processed at a time, in the first-level cache


@jit
def sum_pushes(out, addresses, scale):  # type: ignore[no-untyped-def]
    """Set out <- scale times the sum of the pushes; `out` may be one of them."""
    total = np.empty(_BLOCK, out.dtype)
    for start in range(0, out.size, _BLOCK):
        stop = min(start + _BLOCK, out.size)
        size = stop - start
        first = carray(pointer(addresses[0], out), out.size)[start:stop]
        for i in range(size):
            total[i] = first[i]
        for k in range(1, addresses.size):
            source = carray(pointer(addresses[k], out), out.size)[start:stop]
            for i in range(size):
                total[i] += source[i]
        target = out[start:stop]
        for i in range(size):
            target[i] = total[i] * scale


@jit
def elastic_update(centre, addresses, alpha):  # type: ignore[no-untyped-def]
    """Set centre <- centre + sum of e[k] = alpha (push[k] - old centre), and push[k] <- e[k]."""
    before = np.empty(_BLOCK, centre.dtype)
    for start in range(0, centre.size, _BLOCK):
        stop = min(start + _BLOCK, centre.size)
        size = stop - start
        c = centre[start:stop]
        for i in range(size):
            before[i] = c[i]
        for k in range(addresses.size):
            x = carray(pointer(addresses[k], centre), centre.size)[start:stop]
            for i in range(size):
                e = alpha * (x[i] - before[i])
                x[i] = e
                c[i] += e


def warm_up() -> None:
    """Compile both kernels for float32, before anything is timed."""
    values = np.zeros(1, np.float32)
    push = np.zeros(1, np.float32)
    addresses = np.array([push.ctypes.data], np.int64)
    sum_pushes(values, addresses, np.float32(1))
    elastic_update(values, addresses, np.float32(1))
