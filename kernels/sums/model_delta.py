"""Passes over the buffers of asynchronous averaging (LASGD); each reads and writes every element once.

Buffers of a bucket: `model`, which is being trained; `snapshot` of it, which a round averages; `average`,
which the round reduces in place; and `correction`, the sum of finished rounds' corrections that are not yet
applied to the model. All are 1-D, contiguous, and of the same length and type: float32, float64, float16 or
bfloat16, in host memory or on one GPU, where a call only enqueues work on torch's current stream.

Every operation is rounded once, in the type of the tensors; half precisions are computed in float32 and
rounded when stored. Host and GPU give identical bits, except for the payload of NaN and the order in which
squares are added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.kernels import cuda_loader
from hpcsgd.kernels.codec.spec import SQUARE_SUMS
from hpcsgd.kernels.jit import jit
from hpcsgd.kernels.parallel import CHUNK, in_chunks

_ACCESS, _WARP = 16, 32
#: Elements of half precision at a time: they fit the cache and are too few for torch to use threads.
_HALF_CHUNK = 31 * 1024


def take_snapshot(model: Tensor, correction: Tensor, average: Tensor, snapshot: Tensor) -> None:
    """Set average <- snapshot <- model + correction.

    Where `correction` is zero the result is the model bit for bit, except that -0.0 becomes 0.0.
    """
    if _on_gpu(model):
        _launch("take_snapshot", model, correction, average, snapshot)
    else:
        _on_host(_take_snapshot, _take_snapshot_half, model, correction, average, snapshot)


def accumulate(average: Tensor, snapshot: Tensor, correction: Tensor, share: float = 1.0) -> float | Tensor:
    """Set correction <- correction + share * (average - snapshot).

    Returns
    -------
    float or Tensor
        Sum of squares of average - snapshot, in float64; a tensor of shape () on the GPU for tensors there.
        It does not depend on the number of threads.
    """
    if not _on_gpu(correction):
        exact = np.float64 if correction.dtype == torch.float64 else np.float32
        full, half = (partial(function, exact(share)) for function in (_accumulate, _accumulate_half))
        return float(sum(_on_host(full, half, average, snapshot, correction)))
    blocks = cuda_loader.grid_size(correction.device, _accesses(correction))
    warps = blocks * cuda_loader.BLOCK_THREADS // _WARP
    squares = torch.empty(warps, dtype=torch.float64, device=correction.device)
    _launch("accumulate", average, snapshot, correction, squares, np.float64(share))
    return squares.sum()


def apply_correction(model: Tensor, correction: Tensor) -> None:
    """Set model <- model + correction, then correction <- 0."""
    if _on_gpu(model):
        _launch("apply_correction", model, correction)
    else:
        _on_host(_apply_correction, _apply_correction_half, model, correction)


def warm_up(dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """Compile the kernels for tensors of these types on `device`, or load them from the cache."""
    for dtype in set(dtypes):
        one = torch.zeros(1, dtype=dtype, device=device)
        take_snapshot(one, one.clone(), one.clone(), one.clone())
        accumulate(one.clone(), one.clone(), one)
        apply_correction(one, one.clone())


@jit
def _take_snapshot(model, correction, average, snapshot):  # type: ignore[no-untyped-def]
    for i in range(model.size):
        value = model[i] + correction[i]
        snapshot[i] = value
        average[i] = value


@jit
def _accumulate(share, average, snapshot, correction):  # type: ignore[no-untyped-def]
    """Squares go to several partial sums, so that the additions do not depend on one another."""
    sums = np.zeros(SQUARE_SUMS, np.float64)
    for first in range(0, correction.size, SQUARE_SUMS):
        last = first + SQUARE_SUMS
        new, old, out = average[first:last], snapshot[first:last], correction[first:last]
        for k in range(out.size):
            change = new[k] - old[k]
            out[k] += share * change
            sums[k] += np.float64(change) * np.float64(change)
    return sums.sum()


@jit
def _apply_correction(model, correction):  # type: ignore[no-untyped-def]
    for i in range(model.size):
        model[i] += correction[i]
        correction[i] = 0


def _take_snapshot_half(model: Tensor, correction: Tensor, average: Tensor, snapshot: Tensor) -> None:
    torch.add(model, correction, out=snapshot)
    average.copy_(snapshot)


def _accumulate_half(share: Any, average: Tensor, snapshot: Tensor, correction: Tensor) -> float:
    wide = [tensor.to(torch.float32) for tensor in (average, snapshot, correction)]
    squares = _accumulate(share, *[tensor.numpy() for tensor in wide])
    correction.copy_(wide[-1])
    return float(squares)


def _apply_correction_half(model: Tensor, correction: Tensor) -> None:
    model.add_(correction)
    correction.zero_()


def _on_host(full: Callable[..., Any], half: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """Run `full` (or `half`, on half precisions) chunk by chunk; returns the results of all calls."""
    numel = tensors[0].numel()
    results: list[list[Any]] = [[]] * -(-numel // CHUNK)

    def process(first: int, last: int) -> None:
        parts = [tensor[first:last] for tensor in tensors]
        if parts[0].element_size() >= 4:
            results[first // CHUNK] = [full(*[part.numpy() for part in parts])]
        else:
            chunks = zip(*[torch.split(part, _HALF_CHUNK) for part in parts], strict=True)
            results[first // CHUNK] = [half(*chunk) for chunk in chunks]

    for _ in in_chunks(process, numel, CHUNK):
        pass
    return list(itertools.chain.from_iterable(results))


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def _accesses(tensor: Tensor) -> int:
    """Return the number of memory accesses of a tensor; each thread makes one at a time."""
    return -(-tensor.nbytes // _ACCESS)


def _launch(kernel: str, *arguments: Tensor | np.float64) -> None:
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    first = tensors[0]
    aligned = all(tensor.data_ptr() % _ACCESS == 0 for tensor in tensors)
    fixed = np.int64(first.numel()), np.int32(aligned)
    name = f"{kernel}_{cuda_loader.dtype_name(first)}"
    cuda_loader.launch_strided("sums/model_delta", name, first, _accesses(first), *fixed, *arguments)
