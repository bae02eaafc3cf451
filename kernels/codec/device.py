"""The kernels of compression on tensors in a GPU's memory: the functions of `host`, with the same bits.

A call only puts work on torch's current stream. What `host` says of types holds, but float64 is converted
as a whole, not in the cache.
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
from hpcsgd.kernels.codec.spec import Lanes, Layout

_QUAD, _WARP, _MASK_ROWS = 4, 32, 32
_COLUMNS, _ROWS = spec.ROTATION_COLUMNS, spec.ROTATION_ROWS
_ROTATION_THREADS = 512
#: Bytes; 32 groups of 32 rows, each with one row more than it needs.
_ROTATION_MEMORY = 32 * 33 * _COLUMNS * 4


def norms(x: Tensor, residual: Tensor | None, layout: Layout, euclidean: bool, out: Tensor) -> Iterator[None]:
    """The norm of each row of x + residual: `out` (rows,)."""
    x = _readable(x)
    fixed = *_extent(layout, layout.rows), _aligned(layout, x, residual), np.int32(euclidean)
    cuda_loader.spread(
        "codec/quantise", f"norms_{cuda_loader.name(x)}", x, layout.rows * _WARP, x, residual, *fixed, out
    )
    yield


def choose_scales(
    x: Tensor, residual: Tensor | None, norms: Tensor, layout: Layout, levels: Tensor, masks: Tensor
) -> Iterator[None]:
    """Which elements fit which finer scale: `masks` (scales - 1, words of 32 rows)."""
    x = _readable(x)
    fixed = *_extent(layout, layout.rows), _aligned(layout, x, residual, masks), levels, np.int32(len(levels))
    threads = masks.numel() // _QUAD
    cuda_loader.spread(
        "codec/quantise",
        f"choose_scales_{cuda_loader.name(x)}",
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
    layout: Layout,
    lanes: Lanes,
    levels: Tensor,
    masks: Tensor,
    key: Key,
    offset: int,
    words: Tensor,
) -> Iterator[None]:
    """Quantise x + residual into `words`; `residual` becomes what the codes do not say."""
    x = _readable(x)
    coding = _coding(layout, lanes, levels, masks, x, residual, words)
    kernel, threads = f"encode_{cuda_loader.name(x)}_{cuda_loader.name(words)}", layout.words // _QUAD
    cuda_loader.spread(
        "codec/quantise", kernel, x, threads, x, residual, norms, *coding, *_counter(key, offset), words
    )
    yield


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
    result = _writable(out)
    coding = _coding(layout, lanes, levels, masks, words, result)
    kernel, threads = f"decode_{cuda_loader.name(result)}_{cuda_loader.name(words)}", layout.words // _QUAD
    sums = np.int32(terms), np.float32(factor)
    cuda_loader.spread("codec/quantise", kernel, words, threads, words, norms, *coding, *sums, result)
    _deliver(result, out)
    yield


def rotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Rotate `x` into `out` (float32), which may be `x`; see `hpcsgd.kernels.codec.hadamard`."""
    x = _readable(x)
    _rotate(f"rotate_{cuda_loader.name(x)}", x, key, offset, out)
    yield


def unrotate(x: Tensor, key: Key, offset: int, out: Tensor) -> Iterator[None]:
    """Undo `rotate`: from `x` (float32) into `out`, which may be `x`."""
    result = _writable(out)
    _rotate(f"unrotate_{cuda_loader.name(result)}", x, key, offset, result)
    _deliver(result, out)
    yield


def pick(x: Tensor, key: Key, out: Tensor) -> Iterator[None]:
    """Draw as many elements of `x` as `out` (float32) has; each stretch of `x` gives one."""
    x = _readable(x)
    sizes = np.int64(x.numel()), np.int64(out.numel())
    cuda_loader.spread(
        "codec/sample", f"pick_{cuda_loader.name(x)}", x, out.numel(), x, *sizes, *_words_of(key), out
    )
    yield


def place(values: Tensor, key: Key, by_length: bool, clear: bool, out: Tensor) -> Iterator[None]:
    """Put `values` (float32) where `pick` found them in `out`; with `clear` the others become 0.

    With `by_length` each is multiplied by the length of its stretch, which makes the sample unbiased.
    """
    result = out if out.dtype != torch.float64 else out.to(torch.float32)
    if clear:
        result.zero_()
    sizes = np.int64(out.numel()), np.int64(values.numel())
    fixed = *sizes, *_words_of(key), np.int32(by_length)
    cuda_loader.spread(
        "codec/sample", f"place_{cuda_loader.name(result)}", values, values.numel(), values, *fixed, result
    )
    _deliver(result, out)
    yield


def _rotate(kernel: str, x: Tensor, key: Key, offset: int, out: Tensor) -> None:
    """A block of threads for each tile, and one for what no tile covers."""
    whole, rest = divmod(x.numel(), _ROWS * _COLUMNS)
    blocks = whole + (rest // (2 * _COLUMNS)).bit_count() + (rest % (2 * _COLUMNS) > 0)
    if blocks:
        arguments = cuda_loader.values(x, np.int64(x.numel()), *_counter(key, offset), out)
        cuda_loader.launch(
            "codec/hadamard", kernel, x.device, blocks, _ROTATION_THREADS, _ROTATION_MEMORY, arguments
        )


def _readable(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype == torch.float64 else x


def _writable(out: Tensor) -> Tensor:
    """`out`, or where the kernel writes what is then converted to its type."""
    return torch.empty_like(out, dtype=torch.float32) if out.dtype == torch.float64 else out


def _deliver(result: Tensor, out: Tensor) -> None:
    if result is not out:
        out.copy_(result)


def _extent(layout: Layout, count: int) -> tuple[Any, ...]:
    return np.int64(layout.numel), np.int64(layout.row), np.int64(count)


def _aligned(layout: Layout, *tensors: Tensor | None) -> np.int32:
    """Whether four elements at a time can be read and written from the start of every row on."""
    there = [tensor for tensor in tensors if tensor is not None]
    quads = all(tensor.data_ptr() % min(16, _QUAD * tensor.element_size()) == 0 for tensor in there)
    return np.int32(quads and layout.row % _QUAD == 0)


def _coding(
    layout: Layout, lanes: Lanes, levels: Tensor, masks: Tensor, *tensors: Tensor | None
) -> tuple[Any, ...]:
    scales = levels, np.int32(len(levels)), masks, np.int64(masks.shape[1])
    plan = np.int32(lanes.count), np.int32(lanes.width)
    return *_extent(layout, layout.tiles), _aligned(layout, masks, *tensors), *plan, *scales


def _words_of(key: Key) -> tuple[np.uint32, np.uint32]:
    return np.uint32(key[0]), np.uint32(key[1])


def _counter(key: Key, offset: int) -> tuple[np.uint32, np.uint32, np.uint32]:
    return *_words_of(key), np.uint32(offset % 2**32)
