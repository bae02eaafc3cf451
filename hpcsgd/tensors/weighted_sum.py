"""Weighted sums of flat tensors, with the same bits wherever they lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 64 * 1024  # elements that are added up at a time, in the second-level cache


def combine(out: Tensor, terms: Sequence[tuple[Tensor, float]]) -> None:
    """out <- the weighted sum of 1-D tensors, of which it may itself be one.

    Added up in the order given, half precisions in float32, each element for itself: the same bits
    wherever the tensors lie.
    """
    if out.device.type == "cpu" and out.element_size() >= 4:
        _mix_kernel()(
            out.numpy(),
            np.array([tensor.data_ptr() for tensor, _ in terms], np.int64),
            np.array([weight for _, weight in terms], out.numpy().dtype),
        )
        return
    wide = out.dtype if out.element_size() >= 4 else torch.float32
    total = torch.empty(min(_CHUNK, out.numel()), dtype=wide, device=out.device)
    for start in range(0, out.numel(), _CHUNK):
        stop = min(start + _CHUNK, out.numel())
        piece = total[: stop - start].zero_()
        for tensor, weight in terms:
            piece.add_(tensor[start:stop], alpha=weight)
        out[start:stop] = piece


@functools.cache
def _mix_kernel() -> Any:
    from hpcsgd.kernels.sums import weighted_sum

    return weighted_sum.mix
