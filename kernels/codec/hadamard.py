"""Randomised Hadamard rotation in tiles: random signs, then a normalised Walsh-Hadamard transform.

The rotation spreads large elements over their tile, so that one scale fits all elements, and it is linear,
so that it commutes with sums. A tile is transformed in the cache in two passes: within blocks of `MAX_ROWS`
rows, then between the blocks. Blocks are an odd number of cache lines apart there, because at a distance of
a power of two they would map to the same cache sets. The layout is specified in `spec`.

Random signs and a Hadamard transform before stochastic quantisation: Suresh et al., arXiv 1611.00429.
"""

from __future__ import annotations

import math

import numpy as np

from hpcsgd.kernels.codec import spec
from hpcsgd.kernels.codec.float_bits import bits_of, float_of, hash32
from hpcsgd.kernels.codec.hadamard_rows import MAX_ROWS, transform
from hpcsgd.kernels.jit import jit

_COLUMNS, _ROWS = spec.ROTATION_COLUMNS, spec.ROTATION_ROWS
_BLOCK = MAX_ROWS * _COLUMNS
_BLOCK_STRIDE = _BLOCK + _COLUMNS
_SIGN, _ONE = np.uint32(0x80000000), np.float32(1)


@jit
def _flip_signs(x, scale, key0, key1, counter, out):  # type: ignore[no-untyped-def]
    """Set out = scale * x with random signs."""
    for j in range(x.size):
        sign = hash32(np.uint32(counter + np.uint32(j)), key0, key1) & _SIGN
        out[j] = float_of(bits_of(x[j] * scale) ^ sign)


@jit
def _scale(x, scale, out):  # type: ignore[no-untyped-def]
    """Set out = scale * x."""
    for j in range(x.size):
        out[j] = x[j] * scale


@jit
def _rotate_tile(x, rows, inverse, key0, key1, counter, lines, out):  # type: ignore[no-untyped-def]
    scale = np.float32(1 / math.sqrt(rows))
    for begin in range(0, x.size, _BLOCK):
        source, line = x[begin : begin + _BLOCK], lines[begin // _BLOCK * _BLOCK_STRIDE :]
        if inverse:
            _scale(source, scale, line)
        else:
            _flip_signs(source, scale, key0, key1, np.uint32(counter + np.uint32(begin)), line)
        transform(min(rows, MAX_ROWS), line, 0, _COLUMNS)
    for begin in range(0, _BLOCK, _COLUMNS):
        transform(rows // MAX_ROWS, lines, begin, _BLOCK_STRIDE)
    for begin in range(0, x.size, _BLOCK):
        target, line = out[begin : begin + _BLOCK], lines[begin // _BLOCK * _BLOCK_STRIDE :]
        if inverse:
            at = np.uint32(counter + np.uint32(begin))
            _flip_signs(line[: target.size], _ONE, key0, key1, at, target)
        else:
            _scale(line[: target.size], _ONE, target)


@jit
def _rows_of_tile(rest):  # type: ignore[no-untyped-def]
    """Return the largest power of two of rows that fits; 1 if fewer than two rows are left."""
    rows = 1
    while rows < _ROWS and 2 * rows * _COLUMNS <= rest:
        rows *= 2
    return rows


@jit
def rotate(x, inverse, key0, key1, counter, out):  # type: ignore[no-untyped-def]
    """Rotate `x` (float32) into `out`, which may be `x`, or apply the inverse; `x` starts at a tile.

    The sign of element i is the hash at index `counter + i`.
    """
    lines = np.empty(_ROWS // MAX_ROWS * _BLOCK_STRIDE, np.float32)
    begin = 0
    while x.size - begin >= 2 * _COLUMNS:
        rows = _rows_of_tile(x.size - begin)
        end = begin + rows * _COLUMNS
        at = np.uint32(counter + np.uint32(begin))
        _rotate_tile(x[begin:end], rows, inverse, key0, key1, at, lines, out[begin:end])
        begin = end
    _flip_signs(x[begin:], _ONE, key0, key1, np.uint32(counter + np.uint32(begin)), out[begin:])
