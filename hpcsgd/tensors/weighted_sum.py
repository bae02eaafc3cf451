"""Weighted sums of flat tensors, with the same bits wherever the tensors lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 64 * 1024  # elements that are summed at a time: they fit the second-level cache


def weighted_sum(out: Tensor, terms: Sequence[tuple[Tensor, float]]) -> None:
    """Set `out` to the weighted sum of 1-D tensors, of which `out` may be one.

    Terms are added in the given order, half precisions in float32, and each element independently of the
    others, so the result does not depend on where the tensors lie.

    Parameters
    ----------
    out
        (numel,), a floating dtype.
    terms
        (tensor, weight) pairs; tensors are of the shape and dtype of `out`.
    """
    on_host, kernels = out.device.type == "cpu", _kernels()
    if not on_host and kernels.device_sums.is_available():
        kernels.device_sums.weighted_sum(out, terms)
        return
    if on_host and out.element_size() >= 4:
        kernels.weighted_sum.weighted_sum(
            out.numpy(),
            np.array([tensor.data_ptr() for tensor, _ in terms], np.int64),
            np.array([weight for _, weight in terms], out.numpy().dtype),
        )
        return
    # In half precision on the host, and in any on a GPU without CuPy.
    wide = out.dtype if out.element_size() >= 4 else torch.float32
    total, product = (torch.empty(min(_CHUNK, out.numel()), dtype=wide, device=out.device) for _ in range(2))
    for start in range(0, out.numel(), _CHUNK):
        stop = min(start + _CHUNK, out.numel())
        chunk = total[: stop - start].zero_()
        for tensor, weight in terms:
            # Two roundings, as in the kernels: with `alpha` they may be one.
            chunk.add_(product[: stop - start].copy_(tensor[start:stop]).mul_(weight))
        out[start:stop] = chunk


@functools.cache
def _kernels() -> Any:
    # Imported late, because numba is slow to import.
    from hpcsgd.kernels import sums
    from hpcsgd.kernels.sums import device_sums, weighted_sum  # noqa: F401

    return sums
