"""Weighted sums of whole models, each of which is read once."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.sync.atomics import intrinsic

carray: Any = numba.carray  # type: ignore[attr-defined]

_BLOCK = 2048  # elements that are added up at a time, in the first-level cache


@intrinsic  # type: ignore[untyped-decorator]
def pointer(_: Any, address: Any, like: Any) -> Any:
    """The address of an element as a pointer to elements like those of an array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    pointer: Any = types.CPointer
    return pointer(like.dtype)(address, like), emit


@jit
def mix(out, addresses, weights):  # type: ignore[no-untyped-def]
    """out <- sum of weights[k] times the array of `out.size` elements at addresses[k], in this order.

    `out` may itself be one of them. One rounding for each product and each sum, in the type of `out`: the
    same bits wherever the arrays lie.
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
