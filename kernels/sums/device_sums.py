"""Sums of tensors in the memory of one GPU, or mapped there, each of which is read once.

A call only enqueues work on torch's current stream. Addresses and weights are arguments of the kernels, by
value: nothing is copied to the device for them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hpcsgd.kernels import cuda_loader

#: Tensors of one launch; the largest number of rows of `reduce_rows`.
MOST_TENSORS = 128
_ACCESS = 16  # bytes
_TENSORS = np.dtype((np.uint64, MOST_TENSORS))
_WEIGHTS = np.dtype((np.float64, MOST_TENSORS))


def reduce_rows(
    rows: Sequence[Tensor], targets: Sequence[Tensor], start: int, stop: int, scale: float
) -> None:
    """Set [start, stop) of each target to `scale` times the sum of that part of all rows, in their order.

    Half precisions are summed and scaled in float32. The bits are those of `hpcsgd.kernels.sums.node_reduce`
    on the host.

    Parameters
    ----------
    rows, targets
        1-D, of one dtype: float32, float64, float16, bfloat16, or int32 and int64, whose sums wrap around.
        Targets may be among the rows. At most 128 of each.
    start, stop
        Multiples of 16 bytes; `stop` may be the end of the rows.
    scale
        Factor; 1 for integers.
    """
    first = rows[0]
    size = _ACCESS // first.element_size()
    cuda_loader.launch_strided(
        "sums/device_sums",
        f"reduce_rows_{cuda_loader.dtype_name(first)}",
        targets[0],
        -(-(stop - start) // size),
        _addresses(rows),
        np.int32(len(rows)),
        _addresses(targets),
        np.int32(len(targets)),
        np.int64(start),
        np.int64(stop),
        np.float64(scale),
    )


def weighted_sum(out: Tensor, terms: Sequence[tuple[Tensor, float]]) -> None:
    """Set `out` to the weighted sum of 1-D tensors, of which it may be one, in the given order.

    Each product and each sum is rounded once, in the type of `out`, or in float32 for half precisions, as
    `hpcsgd.tensors.weighted_sum` does on the host.

    Parameters
    ----------
    out
        (numel,), float32, float64, float16 or bfloat16.
    terms
        (tensor, weight) pairs; tensors are of the shape and dtype of `out`.
    """
    wide = out.dtype if out.element_size() >= 4 else torch.float32
    several = len(terms) > MOST_TENSORS
    partial = torch.empty_like(out, dtype=wide) if several else None
    for first in range(0, len(terms), MOST_TENSORS):
        some = terms[first : first + MOST_TENSORS]
        is_last = first + MOST_TENSORS >= len(terms)
        before, after = partial if first else None, None if is_last else partial
        tensors = [tensor for tensor, _ in some]
        aligned = all(tensor.data_ptr() % _ACCESS == 0 for tensor in (out, *tensors))
        weights = np.zeros((), np.dtype([("at", _WEIGHTS)]))
        weights["at"][: len(some)] = [weight for _, weight in some]
        cuda_loader.launch_strided(
            "sums/device_sums",
            f"weighted_sum_{cuda_loader.dtype_name(out)}",
            out,
            -(-out.nbytes // _ACCESS),
            np.int64(out.numel()),
            np.int32(aligned),
            _addresses(tensors),
            weights,
            np.int32(len(some)),
            before,
            after,
            out,
        )


def is_available() -> bool:
    """Return whether these kernels can be compiled and launched."""
    return cuda_loader.is_available()


def warm_up(device: torch.device) -> None:
    """Compile the kernels, of all types at once, for tensors on `device`, or load them from the cache."""
    one = torch.zeros(1, device=device)
    reduce_rows([one], [one], 0, 1, 1.0)


def _addresses(tensors: Sequence[Tensor]) -> np.ndarray:
    """Return a struct of their addresses, as an argument by value."""
    found = np.zeros((), np.dtype([("at", _TENSORS)]))
    found["at"][: len(tensors)] = [tensor.data_ptr() for tensor in tensors]
    return found
