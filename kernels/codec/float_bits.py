"""Bit-level arithmetic of host kernels: the hash, float32 as bits, and scales from norms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import extending, types

from hpcsgd.kernels.codec import spec
from hpcsgd.kernels.jit import jit

intrinsic: Any = extending.intrinsic
overload: Any = extending.overload

_A, _B, _C = np.uint32(spec.HASH_A), np.uint32(spec.HASH_B), np.uint32(spec.HASH_C)
_SHIFT = np.uint32(32 - spec.RANDOM_BITS)
_UNIT = np.float32(2.0**-spec.RANDOM_BITS)
_EXPONENT_ONE = 254  # twice the exponent field of 1.0


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_: Any, number: Any) -> Any:
    """Return the bits of a float32 as uint32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), emit


@intrinsic  # type: ignore[untyped-decorator]
def float_of(_: Any, bits: Any) -> Any:
    """Return the float32 with these bits (uint32)."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), emit


def _as_word(words, value):  # type: ignore[no-untyped-def]
    """Return `value` (uint32) in the type of `words`."""
    return words.dtype.type(value)


@overload(_as_word, inline="always")
def _as_word_compiled(words, value):  # type: ignore[no-untyped-def]
    if words.dtype == types.uint64:
        return lambda words, value: np.uint64(value)
    return lambda words, value: np.uint32(value)


as_word: Any = _as_word


def _element(values, j):  # type: ignore[no-untyped-def]
    """Return element j of an array, or the number itself if `values` is a number."""
    return values[j] if isinstance(values, np.ndarray) else values


@overload(_element, inline="always")
def _element_compiled(values, j):  # type: ignore[no-untyped-def]
    if isinstance(values, types.Array):
        return lambda values, j: values[j]
    return lambda values, j: values


element: Any = _element


@jit
def hash32(index, key0, key1):  # type: ignore[no-untyped-def]
    """Return the 32-bit hash of an element's index under a key."""
    h = np.uint32((index ^ key0) * _A)
    h ^= h >> np.uint32(16)
    h = np.uint32(np.uint32(h + key1) * _B)
    h ^= h >> np.uint32(15)
    h = np.uint32(h * _C)
    return np.uint32(h ^ (h >> np.uint32(15)))


@jit
def uniform(index, key0, key1):  # type: ignore[no-untyped-def]
    """Return a float32 of [0, 1) for an element: 24 bits of its hash."""
    return np.float32(np.int32(hash32(index, key0, key1) >> _SHIFT)) * _UNIT


@jit
def scale_of(norm):  # type: ignore[no-untyped-def]
    """Return (pre, base, post) of a row's norm (uint16): norm * pre = base, near 1; post = 1 / pre."""
    bits = np.uint32(norm)
    field: Any = min(max(_EXPONENT_ONE - np.int32(bits >> np.uint32(7)), 1), 253)
    exponent = np.uint32(field)
    pre = float_of(np.uint32(exponent << np.uint32(23)))
    post = float_of(np.uint32(np.uint32(np.uint32(_EXPONENT_ONE) - exponent) << np.uint32(23)))
    return pre, float_of(np.uint32(bits << np.uint32(16))) * pre, post


@jit
def inverse_of(levels, base):  # type: ignore[no-untyped-def]
    """Return levels per unit; 0 for a row of zeros."""
    return levels / base if base > np.float32(0) else np.float32(0)
