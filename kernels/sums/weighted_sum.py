"""Weighted sum of arrays, each of which is read once."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sync.atomics import intrinsic

carray: Any = numba.carray  # type: ignore[attr-defined]

_BLOCK = 2048  # elements that are summed at a time, in the first-level cache


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_: Any, address: Any, like: Any) -> Any:
    """Convert an address to a pointer to elements of the type of the array `like`."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    pointer: Any = types.CPointer
    return pointer(like.dtype)(address, like), emit


@jit
def weighted_sum(out, addresses, weights):  # type: ignore[no-untyped-def]
    """Set out <- sum of weights[k] times the array of `out.size` elements at addresses[k], in this order.

    `out` may be one of the arrays. Each product and each sum is rounded once, in the type of `out`, so the
    result does not depend on where the arrays lie.
    """
    total = np.empty(_BLOCK, out.dtype)
    for start in range(0, out.size, _BLOCK):
        stop = min(start + _BLOCK, out.size)
        size = stop - start
        for k in range(addresses.size):
            source = carray(pointer(addresses[k], out), out.size)[start:stop]
            weight = weights[k]
            if k == 0:
                for i in range(size):
                    total[i] = weight * source[i]
            else:
                for i in range(size):
                    total[i] += weight * source[i]
        target = out[start:stop]
        for i in range(size):
            target[i] = total[i]
