"""The kernels of compression on tensors in host memory; `device` has the same functions for a GPU.

Every function is a generator that works piece by piece and yields in between, so that the communication
thread can look after its messages. A piece is small enough for the second-level cache; with several
threads (`torch.get_num_threads()`) as many pieces are done at a time.

Gradients may be float32, float16, bfloat16 or float64; other than float32 they are converted a piece at a
time, in the cache. Norms are uint16; words and masks int32 or int64, to be read as unsigned; everything
else is float32. All tensors are 1-D (masks: 2-D) and contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.kernels.codec import hadamard as rotation
from hpcsgd.kernels.codec import quantise, sample
from hpcsgd.kernels.codec.spec import ROTATION_COLUMNS, ROTATION_ROWS, Lanes, Layout
from hpcsgd.kernels.parallel import PIECE, in_pieces

Key = tuple[int, int]

_MASK_ROWS = 32
_TILE = ROTATION_ROWS * ROTATION_COLUMNS


def norms(x: Tensor, residual: Tensor | None, layout: Layout, euclidean: bool, out: Tensor) -> Iterator[None]:
    """The norm of each row of x + residual: `out` (rows,)."""
    rest, result = _array(residual), out.numpy()

    def piece(first: int, last: int) -> None:
        values, start = _float32(x, layout, first, last)
        quantise.row_norms(values, start, rest, layout.numel, layout.row, first, last, euclidean, result)

    return in_pieces(piece, layout.rows, PIECE // max(1, layout.row))


def choose_scales(
    x: Tensor, residual: Tensor | None, norms: Tensor, layout: Layout, levels: Tensor, masks: Tensor
) -> Iterator[None]:
    """Which elements fit which finer scale: `masks` (scales - 1, words of 32 rows)."""
    rest, tops, result = _array(residual), levels.numpy(), _unsigned(masks.zero_())

    def piece(first: int, last: int) -> None:
        values, start = _float32(x, layout, first, last)
        quantise.choose_scales(
            values, start, rest, norms.numpy(), layout.numel, layout.row, tops, first, last, result
        )

    return in_pieces(piece, layout.rows, PIECE // max(1, layout.row), _MASK_ROWS)


def encode(
    x: Tensor,
    residual: Tensor | None,
    norms: Tensor,
    layout: Layout,
    lanes: Lanes,
    levels: Tensor,
    masks: Tensor,
    key: Key,
    offset: int,
    words: Tensor,
) -> Iterator[None]:
    """Quantise x + residual into `words`; `residual` becomes what the codes do not say."""
    rest, result = _array(residual), _unsigned(words)
    key0, key1 = map(np.uint32, key)
    fixed = (norms.numpy(), layout.numel, layout.row, lanes.count, lanes.width, levels.numpy())

    def piece(first: int, last: int) -> None:
        values, start = _float32(x, layout, first * lanes.count, last * lanes.count)
        quantise.encode(
            values, start, rest, *fixed, _unsigned(masks), key0, key1, offset, first, last, result
        )

    return in_pieces(piece, layout.tiles, PIECE // max(1, layout.row * lanes.count))


def decode(
    words: Tensor,
    norms: Tensor,
    layout: Layout,
    lanes: Lanes,
    levels: Tensor,
    masks: Tensor,
    terms: int,
    factor: float,
    out: Tensor,
) -> Iterator[None]:
    """Write `factor` times the sum of `terms` ranks' codes."""
    tops = levels.numpy()
    fixed = (norms.numpy(), layout.numel, layout.row, lanes.count, lanes.width, tops, _unsigned(masks))
    bias, scale = int(tops[0]) * terms, np.float32(factor)

    def piece(first: int, last: int) -> None:
        part = layout.elements(first, last)
        whole = out.dtype == torch.float32
        values = out[part] if whole else torch.empty(part.stop - part.start)
        quantise.decode(_unsigned(words), *fixed, bias, scale, first, last, values.numpy(), part.start)
        if not whole:
            out[part] = values

    return in_pieces(piece, layout.tiles, PIECE // max(1, layout.row * lanes.count))


def rotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Rotate `x` into `out` (float32), which may be `x`; see `hpcsgd.kernels.codec.hadamard`."""
    return _rotate(x, False, key, offset, out)


def unrotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Undo `rotate`: from `x` (float32) into `out`, which may be `x`."""
    return _rotate(x, True, key, offset, out)


def _rotate(x: Tensor, inverse: bool, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    key0, key1 = map(np.uint32, key)

    def piece(first: int, last: int) -> None:
        part = slice(first * _TILE, min(last * _TILE, x.numel()))
        values = x[part].to(torch.float32)
        result = out[part] if out.dtype == torch.float32 else torch.empty_like(values)
        counter = np.uint32((offset + part.start) % 2**32)
        rotation.rotate(values.numpy(), inverse, key0, key1, counter, result.numpy())
        if out.dtype != torch.float32:
            out[part] = result

    return in_pieces(piece, -(-x.numel() // _TILE), PIECE // _TILE)


def pick(x: Tensor, key: Key, out: Tensor) -> Iterator[None]:
    """Draw as many elements of `x` as `out` (float32) has; each stretch of `x` gives one."""

    def piece(first: int, last: int) -> None:
        indices, _ = _coordinates(x.numel(), out.numel(), key, first, last)
        out[first:last] = torch.index_select(x, 0, indices)

    return in_pieces(piece, out.numel(), PIECE)


def place(values: Tensor, key: Key, by_length: bool, clear: bool, out: Tensor) -> Iterator[None]:
    """Put `values` (float32) where `pick` found them in `out`; with `clear` the others become 0.

    With `by_length` each is multiplied by the length of its stretch, which makes the sample unbiased.
    """
    count, numel = values.numel(), out.numel()
    if clear and count == 0:
        out.zero_()

    def piece(first: int, last: int) -> None:
        indices, lengths = _coordinates(numel, count, key, first, last)
        if clear:
            out[first * numel // count : last * numel // count] = 0
        part = values[first:last]
        out.index_copy_(0, indices, (part * lengths if by_length else part).to(out.dtype))

    return in_pieces(piece, count, PIECE * count // max(1, numel) if clear else PIECE)


def _coordinates(numel: int, count: int, key: Key, first: int, last: int) -> tuple[Tensor, Tensor]:
    indices, lengths = torch.empty(last - first, dtype=torch.int64), torch.empty(last - first)
    key0, key1 = map(np.uint32, key)
    sample.coordinates(numel, count, key0, key1, first, last, indices.numpy(), lengths.numpy())
    return indices, lengths


def _float32(x: Tensor, layout: Layout, first_row: int, last_row: int) -> tuple[np.ndarray, int]:
    """The elements of some rows as float32, and where they start."""
    start = first_row * layout.row
    return x[start : last_row * layout.row].to(torch.float32).numpy(), start


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def _unsigned(tensor: Tensor) -> Any:
    return tensor.numpy().view(np.uint32 if tensor.element_size() == 4 else np.uint64)
