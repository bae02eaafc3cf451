"""Compression kernels for tensors on a GPU: the functions of `host`, with identical bits.

A call only enqueues work on torch's current stream. Types are those of `host`, except that float64 tensors
are converted as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.kernels import cuda_loader
from hpcsgd.kernels.codec import spec
from hpcsgd.kernels.codec.host import Key
from hpcsgd.kernels.codec.spec import Lanes, Tiling

_QUAD, _WARP, _MASK_ROWS = 4, 32, 32
_COLUMNS, _ROWS = spec.ROTATION_COLUMNS, spec.ROTATION_ROWS
_ROTATION_THREADS = 512
#: Bytes: 32 groups of 32 rows, each padded by one row.
_ROTATION_MEMORY = 32 * 33 * _COLUMNS * 4


def norms(x: Tensor, residual: Tensor | None, tiling: Tiling, euclidean: bool, out: Tensor) -> Iterator[None]:
    """Write the norm of each row of x + residual to `out` (rows,)."""
    x = _readable(x)
    fixed = *_extent(tiling, tiling.rows), _aligned(tiling, x, residual), np.int32(euclidean)
    cuda_loader.launch_strided(
        "codec/quantise",
        f"norms_{cuda_loader.dtype_name(x)}",
        x,
        tiling.rows * _WARP,
        x,
        residual,
        *fixed,
        out,
    )
    yield


def choose_scales(
    x: Tensor, residual: Tensor | None, norms: Tensor, tiling: Tiling, levels: Tensor, masks: Tensor
) -> Iterator[None]:
    """Write to `masks` (scales - 1, words of 32 rows) which elements fit which finer scale."""
    x = _readable(x)
    fixed = *_extent(tiling, tiling.rows), _aligned(tiling, x, residual, masks), levels, np.int32(len(levels))
    threads = masks.numel() // _QUAD
    cuda_loader.launch_strided(
        "codec/quantise",
        f"choose_scales_{cuda_loader.dtype_name(x)}",
        x,
        threads,
        x,
        residual,
        norms,
        *fixed,
        masks,
    )
    yield


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
    x = _readable(x)
    fixed = _code_arguments(tiling, lanes, levels, masks, x, residual, words)
    kernel = f"encode_{cuda_loader.dtype_name(x)}_{cuda_loader.dtype_name(words)}"
    cuda_loader.launch_strided(
        "codec/quantise",
        kernel,
        x,
        tiling.words // _QUAD,
        x,
        residual,
        norms,
        *fixed,
        *_key_and_offset(key, offset),
        words,
    )
    yield


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
    result = _writable(out)
    fixed = _code_arguments(tiling, lanes, levels, masks, words, result)
    kernel = f"decode_{cuda_loader.dtype_name(result)}_{cuda_loader.dtype_name(words)}"
    sums = np.int32(terms), np.float32(factor)
    cuda_loader.launch_strided(
        "codec/quantise", kernel, words, tiling.words // _QUAD, words, norms, *fixed, *sums, result
    )
    _convert(result, out)
    yield


def rotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Rotate `x` into `out` (float32), which may be `x`; see `hpcsgd.kernels.codec.hadamard`."""
    x = _readable(x)
    _rotate(f"rotate_{cuda_loader.dtype_name(x)}", x, key, offset, out)
    yield


def unrotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Invert `rotate`: from `x` (float32) into `out`, which may be `x`."""
    result = _writable(out)
    _rotate(f"unrotate_{cuda_loader.dtype_name(result)}", x, key, offset, result)
    _convert(result, out)
    yield


def take_sample(x: Tensor, key: Key, out: Tensor) -> Iterator[None]:
    """Fill `out` (float32) with a random sample of the elements of `x`, one from each interval."""
    x = _readable(x)
    sizes = np.int64(x.numel()), np.int64(out.numel())
    kernel = f"take_sample_{cuda_loader.dtype_name(x)}"
    cuda_loader.launch_strided("codec/sample", kernel, x, out.numel(), x, *sizes, *_key_words(key), out)
    yield


def put_sample(values: Tensor, key: Key, by_length: bool, clear: bool, out: Tensor) -> Iterator[None]:
    """Write `values` (float32) to the coordinates that `take_sample` reads; `clear` zeroes the others.

    With `by_length` each value is multiplied by the length of its interval, for an unbiased sample.
    """
    result = out if out.dtype != torch.float64 else out.to(torch.float32)
    if clear:
        result.zero_()
    sizes = np.int64(out.numel()), np.int64(values.numel())
    fixed = *sizes, *_key_words(key), np.int32(by_length)
    kernel = f"put_sample_{cuda_loader.dtype_name(result)}"
    cuda_loader.launch_strided("codec/sample", kernel, values, values.numel(), values, *fixed, result)
    _convert(result, out)
    yield


def _rotate(kernel: str, x: Tensor, key: Key, offset: int, out: Tensor) -> None:
    """Launch one block of threads for each tile, and one for the rest that no tile covers."""
    full_tiles, rest = divmod(x.numel(), _ROWS * _COLUMNS)
    blocks = full_tiles + (rest // (2 * _COLUMNS)).bit_count() + (rest % (2 * _COLUMNS) > 0)
    if blocks:
        arguments = cuda_loader.kernel_arguments(x, np.int64(x.numel()), *_key_and_offset(key, offset), out)
        cuda_loader.launch(
            "codec/hadamard", kernel, x.device, blocks, _ROTATION_THREADS, _ROTATION_MEMORY, arguments
        )


def _readable(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype == torch.float64 else x


def _writable(out: Tensor) -> Tensor:
    """Return `out`, or a buffer for the kernel whose values are then converted to the type of `out`."""
    return torch.empty_like(out, dtype=torch.float32) if out.dtype == torch.float64 else out


def _convert(result: Tensor, out: Tensor) -> None:
    if result is not out:
        out.copy_(result)


def _extent(tiling: Tiling, count: int) -> tuple[Any, ...]:
    return np.int64(tiling.numel), np.int64(tiling.row), np.int64(count)


def _aligned(tiling: Tiling, *tensors: Tensor | None) -> np.int32:
    """Return whether every row can be read and written four elements at a time."""
    quads = all(
        tensor.data_ptr() % min(16, _QUAD * tensor.element_size()) == 0
        for tensor in tensors
        if tensor is not None
    )
    return np.int32(quads and tiling.row % _QUAD == 0)


def _code_arguments(
    tiling: Tiling, lanes: Lanes, levels: Tensor, masks: Tensor, *tensors: Tensor | None
) -> tuple[Any, ...]:
    scales = levels, np.int32(len(levels)), masks, np.int64(masks.shape[1])
    packing = np.int32(lanes.count), np.int32(lanes.width)
    return *_extent(tiling, tiling.tiles), _aligned(tiling, masks, *tensors), *packing, *scales


def _key_words(key: Key) -> tuple[np.uint32, np.uint32]:
    return np.uint32(key[0]), np.uint32(key[1])


def _key_and_offset(key: Key, offset: int) -> tuple[np.uint32, np.uint32, np.uint32]:
    return *_key_words(key), np.uint32(offset % 2**32)
