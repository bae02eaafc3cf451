"""Compression kernels for tensors in host memory; `device` has the same functions for a GPU.

Every function is a generator that works chunk by chunk and yields in between, so that the communication
thread can poll its messages. A chunk fits the second-level cache; with several threads
(`torch.get_num_threads()`) as many chunks are processed between two yields.

Gradients may be float32, float16, bfloat16 or float64; types other than float32 are converted chunk by
chunk, in the cache. Norms are uint16; words and masks are int32 or int64, interpreted as unsigned; all other
tensors are float32. All tensors are 1-D (masks: 2-D) and contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.kernels.codec import hadamard as rotation
from hpcsgd.kernels.codec import quantise, sample
from hpcsgd.kernels.codec.spec import ROTATION_COLUMNS, ROTATION_ROWS, Lanes, Tiling
from hpcsgd.kernels.parallel import CHUNK, in_chunks

Key = tuple[int, int]

_MASK_ROWS = 32
_TILE = ROTATION_ROWS * ROTATION_COLUMNS


def norms(x: Tensor, residual: Tensor | None, tiling: Tiling, euclidean: bool, out: Tensor) -> Iterator[None]:
    """Write the norm of each row of x + residual to `out` (rows,)."""
    remainder, result = _array(residual), out.numpy()

    def process(first: int, last: int) -> None:
        values, start = _float32(x, tiling, first, last)
        quantise.row_norms(values, start, remainder, tiling.numel, tiling.row, first, last, euclidean, result)

    return in_chunks(process, tiling.rows, CHUNK // max(1, tiling.row))


def choose_scales(
    x: Tensor, residual: Tensor | None, norms: Tensor, tiling: Tiling, levels: Tensor, masks: Tensor
) -> Iterator[None]:
    """Write to `masks` (scales - 1, words of 32 rows) which elements fit which finer scale."""
    remainder, tops, result = _array(residual), levels.numpy(), _unsigned(masks.zero_())

    def process(first: int, last: int) -> None:
        values, start = _float32(x, tiling, first, last)
        quantise.choose_scales(
            values, start, remainder, norms.numpy(), tiling.numel, tiling.row, tops, first, last, result
        )

    return in_chunks(process, tiling.rows, CHUNK // max(1, tiling.row), _MASK_ROWS)


def encode(
    x: Tensor,
    residual: Tensor | None,
    norms: Tensor,
    tiling: Tiling,
    lanes: Lanes,
    levels: Tensor,
    masks: Tensor,
    key: Key,
    offset: int,
    words: Tensor,
) -> Iterator[None]:
    """Quantise x + residual into `words`, and replace `residual` by the quantisation error."""
    remainder, result = _array(residual), _unsigned(words)
    key0, key1 = map(np.uint32, key)
    fixed = (norms.numpy(), tiling.numel, tiling.row, lanes.count, lanes.width, levels.numpy())

    def process(first: int, last: int) -> None:
        values, start = _float32(x, tiling, first * lanes.count, last * lanes.count)
        quantise.encode(
            values, start, remainder, *fixed, _unsigned(masks), key0, key1, offset, first, last, result
        )

    return in_chunks(process, tiling.tiles, CHUNK // max(1, tiling.row * lanes.count))


def decode(
    words: Tensor,
    norms: Tensor,
    tiling: Tiling,
    lanes: Lanes,
    levels: Tensor,
    masks: Tensor,
    terms: int,
    factor: float,
    out: Tensor,
) -> Iterator[None]:
    """Write `factor` times the sum of the codes of `terms` ranks to `out`."""
    tops = levels.numpy()
    fixed = (norms.numpy(), tiling.numel, tiling.row, lanes.count, lanes.width, tops, _unsigned(masks))
    bias, scale = int(tops[0]) * terms, np.float32(factor)

    def process(first: int, last: int) -> None:
        part = tiling.elements(first, last)
        in_place = out.dtype == torch.float32
        values = out[part] if in_place else torch.empty(part.stop - part.start, device="cpu")
        quantise.decode(_unsigned(words), *fixed, bias, scale, first, last, values.numpy(), part.start)
        if not in_place:
            out[part] = values

    return in_chunks(process, tiling.tiles, CHUNK // max(1, tiling.row * lanes.count))


def rotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Rotate `x` into `out` (float32), which may be `x`; see `hpcsgd.kernels.codec.hadamard`."""
    return _rotate(x, False, key, offset, out)


def unrotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Invert `rotate`: from `x` (float32) into `out`, which may be `x`."""
    return _rotate(x, True, key, offset, out)


def _rotate(x: Tensor, inverse: bool, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    key0, key1 = map(np.uint32, key)

    def process(first: int, last: int) -> None:
        part = slice(first * _TILE, min(last * _TILE, x.numel()))
        values = x[part].to(torch.float32)
        result = out[part] if out.dtype == torch.float32 else torch.empty_like(values)
        counter = np.uint32((offset + part.start) % 2**32)
        rotation.rotate(values.numpy(), inverse, key0, key1, counter, result.numpy())
        if out.dtype != torch.float32:
            out[part] = result

    return in_chunks(process, -(-x.numel() // _TILE), CHUNK // _TILE)


def take_sample(x: Tensor, key: Key, out: Tensor) -> Iterator[None]:
    """Fill `out` (float32) with a random sample of the elements of `x`, one from each interval."""

    def process(first: int, last: int) -> None:
        indices, _ = _coordinates(x.numel(), out.numel(), key, first, last)
        out[first:last] = torch.index_select(x, 0, indices)

    return in_chunks(process, out.numel(), CHUNK)


def put_sample(values: Tensor, key: Key, by_length: bool, clear: bool, out: Tensor) -> Iterator[None]:
    """Write `values` (float32) to the coordinates that `take_sample` reads; `clear` zeroes the others.

    With `by_length` each value is multiplied by the length of its interval, for an unbiased sample.
    """
    count, numel = values.numel(), out.numel()
    if clear and count == 0:
        out.zero_()

    def process(first: int, last: int) -> None:
        indices, lengths = _coordinates(numel, count, key, first, last)
        if clear:
            out[first * numel // count : last * numel // count] = 0
        part = values[first:last]
        out.index_copy_(0, indices, (part * lengths if by_length else part).to(out.dtype))

    return in_chunks(process, count, CHUNK * count // max(1, numel) if clear else CHUNK)


def _coordinates(numel: int, count: int, key: Key, first: int, last: int) -> tuple[Tensor, Tensor]:
    indices, lengths = (
        torch.empty(last - first, dtype=torch.int64, device="cpu"),
        torch.empty(last - first, device="cpu"),
    )
    key0, key1 = map(np.uint32, key)
    sample.coordinates(numel, count, key0, key1, first, last, indices.numpy(), lengths.numpy())
    return indices, lengths


def _float32(x: Tensor, tiling: Tiling, first_row: int, last_row: int) -> tuple[np.ndarray, int]:
    """Return the elements of a range of rows as float32, and the index of the first."""
    start = first_row * tiling.row
    return x[start : last_row * tiling.row].to(torch.float32).numpy(), start


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def _unsigned(tensor: Tensor) -> Any:
    return tensor.numpy().view(np.uint32 if tensor.element_size() == 4 else np.uint64)
