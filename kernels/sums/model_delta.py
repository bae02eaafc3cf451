"""The passes over the buffers that average a model while it trains, each of which reads and writes once.

Of one bucket `model` is what trains, `shot` the snapshot of it that a round averages, `average` what the
round works on in place, and `gain` what the model has gained from rounds and not yet merged. All are 1-D,
contiguous and alike: float32, float64, float16 or bfloat16, in host memory or in that of one GPU. There a
call only puts work on torch's current stream.

Every operation is rounded once, in the type of the tensors; half precisions are computed in float32 and
rounded when they are stored. Host and GPU give the same bits, but for which NaN it is, and the order in
which squares are added up.
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
from hpcsgd.kernels.parallel import PIECE, in_pieces

_ACCESS, _WARP = 16, 32
#: Elements of half precision at a time: in the cache, and just too few for torch to start threads of its own.
_CHUNK = 31 * 1024


def snapshot(model: Tensor, gain: Tensor, average: Tensor, shot: Tensor) -> None:
    """average <- shot <- model + gain.

    Where `gain` is zero these are the model's bits, but that -0.0 + 0.0 is 0.0.
    """
    if _on_gpu(model):
        _launch("snapshot", model, gain, average, shot)
    else:
        _on_host(_snapshot, _snapshot_half, model, gain, average, shot)


def advance(average: Tensor, shot: Tensor, gain: Tensor, share: float = 1.0) -> float | Tensor:
    """gain <- gain + share * (average - shot).

    Returns
    -------
    float or Tensor
        The sum of squares of average - shot in float64; of tensors on a GPU a tensor () there. It is the
        same for the same tensors, whatever the number of threads.
    """
    if not _on_gpu(gain):
        exact = np.float64 if gain.dtype == torch.float64 else np.float32
        whole, half = (partial(function, exact(share)) for function in (_advance, _advance_half))
        return float(sum(_on_host(whole, half, average, shot, gain)))
    warps = cuda_loader.blocks(gain.device, _shares(gain)) * cuda_loader.THREADS // _WARP
    squares = torch.empty(warps, dtype=torch.float64, device=gain.device)
    _launch("advance", average, shot, gain, squares, np.float64(share))
    return squares.sum()


def merge(model: Tensor, gain: Tensor) -> None:
    """model <- model + gain; gain <- 0."""
    if _on_gpu(model):
        _launch("merge", model, gain)
    else:
        _on_host(_merge, _merge_half, model, gain)


def warm_up(dtypes: Iterable[torch.dtype], device: torch.device) -> None:
    """Compile what tensors of these types on `device` need, or load it from the cache."""
    for dtype in set(dtypes):
        one = torch.zeros(1, dtype=dtype, device=device)
        snapshot(one, one.clone(), one.clone(), one.clone())
        advance(one.clone(), one.clone(), one)
        merge(one, one.clone())


@jit
def _snapshot(model, gain, average, shot):  # type: ignore[no-untyped-def]
    for i in range(model.size):
        value = model[i] + gain[i]
        shot[i] = value
        average[i] = value


@jit
def _advance(share, average, shot, gain):  # type: ignore[no-untyped-def]
    """Add up squares in sums side by side, so that the additions of one do not wait for each other."""
    sums = np.zeros(SQUARE_SUMS, np.float64)
    for first in range(0, gain.size, SQUARE_SUMS):
        last = first + SQUARE_SUMS
        to, start, out = average[first:last], shot[first:last], gain[first:last]
        for k in range(out.size):
            step = to[k] - start[k]
            out[k] += share * step
            sums[k] += np.float64(step) * np.float64(step)
    return sums.sum()


@jit
def _merge(model, gain):  # type: ignore[no-untyped-def]
    for i in range(model.size):
        model[i] += gain[i]
        gain[i] = 0


def _snapshot_half(model: Tensor, gain: Tensor, average: Tensor, shot: Tensor) -> None:
    torch.add(model, gain, out=shot)
    average.copy_(shot)


def _advance_half(share: Any, average: Tensor, shot: Tensor, gain: Tensor) -> float:
    wide = [tensor.to(torch.float32) for tensor in (average, shot, gain)]
    squares = _advance(share, *[tensor.numpy() for tensor in wide])
    gain.copy_(wide[-1])
    return float(squares)


def _merge_half(model: Tensor, gain: Tensor) -> None:
    model.add_(gain)
    gain.zero_()


def _on_host(whole: Callable[..., Any], half: Callable[..., Any], *tensors: Tensor) -> list[Any]:
    """What the calls return that do it piece by piece: of `half` on tensors of half precision."""
    numel = tensors[0].numel()
    results: list[list[Any]] = [[]] * -(-numel // PIECE)

    def piece(first: int, last: int) -> None:
        parts = [tensor[first:last] for tensor in tensors]
        if parts[0].element_size() >= 4:
            results[first // PIECE] = [whole(*[part.numpy() for part in parts])]
        else:
            chunks = zip(*[torch.split(part, _CHUNK) for part in parts], strict=True)
            results[first // PIECE] = [half(*chunk) for chunk in chunks]

    for _ in in_pieces(piece, numel, PIECE):
        pass
    return list(itertools.chain.from_iterable(results))


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _shares(tensor: Tensor) -> int:
    """A thread has as many elements as one access."""
    return -(-tensor.nbytes // _ACCESS)


def _launch(kernel: str, *arguments: Tensor | np.float64) -> None:
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    first = tensors[0]
    aligned = all(tensor.data_ptr() % _ACCESS == 0 for tensor in tensors)
    fixed = np.int64(first.numel()), np.int32(aligned)
    cuda_loader.spread(
        "sums/model_delta", f"{kernel}_{cuda_loader.name(first)}", first, _shares(first), *fixed, *arguments
    )
