"""Stochastic rounding to codes with shared scales, packed so that words can be summed. See `spec`.

Each kernel processes a range of tiles (or rows), so that the caller can interleave other work and several
threads can share it. `x` holds the elements from `start` on, as float32; all other arrays are complete.
`residual` is None or the error-feedback residual, (elements,) float32: it is added to the input, and `encode`
replaces it by the quantisation error.
"""

from __future__ import annotations

import numpy as np

from hpcsgd.kernels.codec import spec
from hpcsgd.kernels.codec.float_bits import as_word, bits_of, element, inverse_of, scale_of, uniform
from hpcsgd.kernels.jit import jit

_SIGN_OFF = np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_LARGEST = np.float32(np.uint32(spec.LARGEST_NORM << 16).view(np.float32))
_ONE, _ZERO = np.float32(1), np.float32(0)
_MASK_ROWS = 32


@jit
def _add_residual(x, residual, first, total):  # type: ignore[no-untyped-def]
    """Set total = x + residual[first:]."""
    e = residual[first : first + x.size]
    for j in range(x.size):
        total[j] = x[j] + e[j]


@jit
def _round_up(bits):  # type: ignore[no-untyped-def]
    """Return the upper half of a float32, rounded up; a finite number stays finite."""
    if bits >= _INFINITY:
        return np.uint16(spec.NOT_FINITE)
    return np.uint16(min((bits + np.uint32(0xFFFF)) >> np.uint32(16), np.uint32(spec.LARGEST_NORM)))


@jit
def _max_magnitude(values):  # type: ignore[no-untyped-def]
    """Return the bits of the largest magnitude; at least those of infinity if a value is not finite."""
    largest = np.uint32(0)
    bits = values.view(np.uint32)
    for j in range(bits.size):
        largest = max(largest, np.uint32(bits[j] & _SIGN_OFF))
    return largest


@jit
def _euclidean_norm(values, sums):  # type: ignore[no-untyped-def]
    """Return the 2-norm, summed in float64 in the order of `spec`."""
    sums[:] = 0
    for first in range(0, values.size, sums.size):
        part = values[first : first + sums.size]
        for k in range(part.size):
            v = np.float64(part[k])
            sums[k] += v * v
    half = sums.size // 2
    while half > 0:
        for k in range(half):
            sums[k] += sums[k + half]
        half //= 2
    return min(np.float32(np.sqrt(sums[0])), _LARGEST)


@jit
def row_norms(x, start, residual, numel, row, first_row, last_row, euclidean, norms):  # type: ignore[no-untyped-def]
    """Write the largest magnitude of each row, or its 2-norm, to `norms` as uint16; see `spec`."""
    total, sums = np.empty(row, np.float32), np.empty(spec.SQUARE_SUMS, np.float64)
    for r in range(first_row, last_row):
        begin, end = r * row, min((r + 1) * row, numel)
        values = x[begin - start : end - start]
        if residual is not None:
            _add_residual(values, residual, begin, total)
            values = total[: end - begin]
        norm = _max_magnitude(values)
        if euclidean and norm < _INFINITY:
            # Never below the largest magnitude, whatever the rounding of the square root.
            norm = max(norm, bits_of(_euclidean_norm(values, sums)))
        norms[r] = _round_up(norm)


@jit
def choose_scales(x, start, residual, norms, numel, row, levels, first_row, last_row, masks):  # type: ignore[no-untyped-def]
    """Set bit r % 32 of `masks[k, r // 32 * row + j]` if element j of row r fits scale k+1.

    An element fits a finer scale if its code there is at most `levels[0]`. The rows of one group of 32 must
    be processed by one thread; the masks are zero at the start.
    """
    total = np.empty(row, np.float32)
    for r in range(first_row, last_row):
        begin, end = r * row, min((r + 1) * row, numel)
        values = x[begin - start : end - start]
        if residual is not None:
            _add_residual(values, residual, begin, total)
            values = total[: end - begin]
        pre, base, _ = scale_of(norms[r])
        shift = np.uint32(r % _MASK_ROWS)
        for k in range(1, levels.size):
            inverse = inverse_of(levels[k], base)
            mask = masks[k - 1, r // _MASK_ROWS * row :]
            for j in range(values.size):
                fits = abs(values[j] * pre * inverse) <= levels[0]
                mask[j] |= np.uint32(np.uint32(fits) << shift)


@jit
def _inverses_of(levels, base, masks, r, row, size, inverses):  # type: ignore[no-untyped-def]
    """Write levels per unit of each element of row r, by its scale."""
    shift = np.uint32(r % _MASK_ROWS)
    for j in range(size):
        inverses[j] = inverse_of(levels[0], base)
    for k in range(1, levels.size):
        inverse = inverse_of(levels[k], base)
        mask = masks[k - 1, r // _MASK_ROWS * row :]
        for j in range(size):
            inverses[j] = inverse if (mask[j] >> shift) & np.uint32(1) else inverses[j]


@jit
def _pack_row(values, pre, inverse, top, counter, key0, key1, shift, word, codes):  # type: ignore[no-untyped-def]
    """Insert the codes of a row into the words, and store them in `codes` unless that is None."""
    for j in range(values.size):
        y = values[j] * pre * element(inverse, j)
        low = np.floor(y)
        if uniform(np.uint32(counter + np.uint32(j)), key0, key1) < y - low:
            low += _ONE
        code = min(max(low, -top), top)
        word[j] |= as_word(word, np.uint32(np.int32(code + top))) << shift
        if codes is not None:
            codes[j] = code


@jit
def _store_residual(values, codes, inverse, post, residual):  # type: ignore[no-untyped-def]
    """Write the quantisation error of a row."""
    for j in range(values.size):
        step = _ONE / element(inverse, j) if element(inverse, j) > _ZERO else _ZERO
        residual[j] = values[j] - codes[j] * step * post


@jit
def encode(  # type: ignore[no-untyped-def]
    x, start, residual, norms, numel, row, lanes, width, levels, masks, key0, key1, offset,
    first_tile, last_tile, words,
):  # fmt: skip
    """Round each element stochastically to a code of its scale and pack the codes.

    Element i uses the random number at index `offset + i`. With several `levels`, `masks` are those of
    `choose_scales`, combined over the ranks; with one level they are not read.
    """
    top = levels[0]
    total, inverses = np.empty(row, np.float32), np.empty(row, np.float32)
    codes = None if residual is None else np.empty(row, np.float32)
    for tile in range(first_tile, last_tile):
        word = words[tile * row : (tile + 1) * row]
        word[:] = 0
        for lane in range(lanes):
            r = tile * lanes + lane
            begin, end = r * row, min((r + 1) * row, numel)
            if begin >= end:
                break
            values = x[begin - start : end - start]
            if residual is not None:
                _add_residual(values, residual, begin, total)
                values = total[: end - begin]
            pre, base, post = scale_of(norms[r])
            shift = as_word(words, np.uint32(lane * width))
            counter = np.uint32(offset + begin)
            if levels.size == 1:
                inverse = inverse_of(top, base)
                _pack_row(values, pre, inverse, top, counter, key0, key1, shift, word, codes)
                if residual is not None:
                    _store_residual(values, codes, inverse, post, residual[begin:end])
            else:
                _inverses_of(levels, base, masks, r, row, end - begin, inverses)
                _pack_row(values, pre, inverses, top, counter, key0, key1, shift, word, codes)
                if residual is not None:
                    _store_residual(values, codes, inverses, post, residual[begin:end])


@jit
def _unpack_row(word, shift, lane_mask, bias, inverse, factor, post, values):  # type: ignore[no-untyped-def]
    """Write factor * post / inverse times the sums of the codes of a row."""
    for j in range(values.size):
        code = np.int32(np.uint32(np.uint32((word[j] >> shift) & lane_mask) - bias))
        step = factor / element(inverse, j) if element(inverse, j) > _ZERO else _ZERO
        values[j] = np.float32(code) * step * post


@jit
def decode(  # type: ignore[no-untyped-def]
    words, norms, numel, row, lanes, width, levels, masks, bias, factor, first_tile, last_tile, out, start
):
    """Write `factor` times the sum held by the words; `out` holds the elements from `start` on.

    `bias` is levels * terms, the sum of the offsets with which codes are stored.
    """
    lane_mask = as_word(words, np.uint32(0xFFFFFFFF >> (32 - width)))
    inverses = np.empty(row, np.float32)
    for tile in range(first_tile, last_tile):
        word = words[tile * row : (tile + 1) * row]
        for lane in range(lanes):
            r = tile * lanes + lane
            begin, end = r * row, min((r + 1) * row, numel)
            if begin >= end:
                break
            _, base, post = scale_of(norms[r])
            shift = as_word(words, np.uint32(lane * width))
            values = out[begin - start : end - start]
            if levels.size == 1:
                inverse = inverse_of(levels[0], base)
                _unpack_row(word, shift, lane_mask, np.uint32(bias), inverse, factor, post, values)
            else:
                _inverses_of(levels, base, masks, r, row, end - begin, inverses)
                _unpack_row(word, shift, lane_mask, np.uint32(bias), inverses, factor, post, values)
