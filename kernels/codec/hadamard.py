"""A random rotation in tiles: random signs, then a normalised Walsh-Hadamard transform. See `spec`.

It spreads a few large elements over all of their tile, so that one scale fits them all, and is linear, so
that sums stay sums. A tile is transformed in the cache in two passes: between the rows of blocks of
`LARGEST` rows, then between the blocks, which lie apart by an odd number of cache lines there, because at
a power of two of them they would fall on one another.

Source: random signs and Hadamard before stochastic quantisation, Suresh et al. 2017 (arXiv 1611.00429).
"""

from __future__ import annotations

import math

import numpy as np

from hpcsgd.kernels.codec import spec
from hpcsgd.kernels.codec.float_bits import bits_of, hashed, number_of
from hpcsgd.kernels.codec.hadamard_rows import LARGEST, transform
from hpcsgd.kernels.jit import jit

_COLUMNS, _ROWS = spec.ROTATION_COLUMNS, spec.ROTATION_ROWS
_BLOCK = LARGEST * _COLUMNS
_APART = _BLOCK + _COLUMNS
_SIGN, _ONE = np.uint32(0x80000000), np.float32(1)


@jit
def _flip(x, scale, key0, key1, counter, out):  # type: ignore[no-untyped-def]
    """out = scale * x with random signs."""
    for j in range(x.size):
        sign = hashed(np.uint32(counter + np.uint32(j)), key0, key1) & _SIGN
        out[j] = number_of(bits_of(x[j] * scale) ^ sign)


@jit
def _scale(x, scale, out):  # type: ignore[no-untyped-def]
    """out = scale * x."""
    for j in range(x.size):
        out[j] = x[j] * scale


@jit
def _rotate_tile(x, rows, inverse, key0, key1, counter, lines, out):  # type: ignore[no-untyped-def]
    scale = np.float32(1 / math.sqrt(rows))
    for begin in range(0, x.size, _BLOCK):
        source, line = x[begin : begin + _BLOCK], lines[begin // _BLOCK * _APART :]
        if inverse:
            _scale(source, scale, line)
        else:
            _flip(source, scale, key0, key1, np.uint32(counter + np.uint32(begin)), line)
        transform(min(rows, LARGEST), line, 0, _COLUMNS)
    for begin in range(0, _BLOCK, _COLUMNS):
        transform(rows // LARGEST, lines, begin, _APART)
    for begin in range(0, x.size, _BLOCK):
        target, line = out[begin : begin + _BLOCK], lines[begin // _BLOCK * _APART :]
        if inverse:
            at = np.uint32(counter + np.uint32(begin))
            _flip(line[: target.size], _ONE, key0, key1, at, target)
        else:
            _scale(line[: target.size], _ONE, target)


@jit
def _rows_of_tile(rest):  # type: ignore[no-untyped-def]
    """The largest power of two of rows that fits; 1 where no two are left."""
    rows = 1
    while rows < _ROWS and 2 * rows * _COLUMNS <= rest:
        rows *= 2
    return rows


@jit
def rotate(x, inverse, key0, key1, counter, out):  # type: ignore[no-untyped-def]
    """Rotate `x` (float32) into `out`, which may be `x`, or back; `x` starts at a tile.

    The sign of element i is drawn at `counter + i`.
    """
    lines = np.empty(_ROWS // LARGEST * _APART, np.float32)
    begin = 0
    while x.size - begin >= 2 * _COLUMNS:
        rows = _rows_of_tile(x.size - begin)
        end = begin + rows * _COLUMNS
        at = np.uint32(counter + np.uint32(begin))
        _rotate_tile(x[begin:end], rows, inverse, key0, key1, at, lines, out[begin:end])
        begin = end
    _flip(x[begin:], _ONE, key0, key1, np.uint32(counter + np.uint32(begin)), out[begin:])
