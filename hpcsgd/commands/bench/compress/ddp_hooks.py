"""DDP's communication hooks on buckets of our own, which times a hook without a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

FP16, POWERSGD = "torch fp16 hook", "torch PowerSGD hook"
_RANK = 2  # that of hpcsgd's PowerSGD
_DDP_BUCKET = 25 * 2**20  # bytes: the default of DDP


def hooks(flat: Tensor, tensors: Sequence[tuple[int, tuple[int, ...]]]) -> dict[str, Callable[[], None]]:
    """Functions by name that replace `flat` by its mean over the ranks. Call it inside `baselines.gloo`.

    Parameters
    ----------
    flat
        (numel,) float32.
    tensors
        (start, shape) of each tensor in `flat`, ascending.
    """
    buckets, group = _buckets(flat, tensors), dist.group.WORLD
    # torch rejects error feedback before two steps without compression; the counter marks them as done.
    state = PowerSGDState(None, matrix_approximation_rank=_RANK, start_powerSGD_iter=2)
    state.iter = state.start_powerSGD_iter

    def fp16() -> None:
        for future in [fp16_compress_hook(group, bucket) for bucket in buckets]:  # type: ignore[arg-type]
            future.wait()

    def powersgd() -> None:
        # One bucket at a time: the hook continues in threads of gloo, so with two buckets in flight the ranks
        # start their all-reduces in different orders, and gloo aborts.
        for bucket in buckets:
            powerSGD_hook(state, bucket).wait()

    # The hook's callbacks hold a reference to the group, and a thread of gloo that drops the last reference
    # aborts. So the returned functions hold one as well, and another function follows this one.
    return {POWERSGD: powersgd, FP16: fp16}


def _buckets(flat: Tensor, tensors: Sequence[tuple[int, tuple[int, ...]]]) -> list[Any]:
    """Split the tensors into buckets as DDP does: a new bucket begins where the last one is full."""
    limit = _DDP_BUCKET // flat.element_size()
    firsts = [0]
    for i, (start, shape) in enumerate(tensors):
        if start + torch.Size(shape).numel() - tensors[firsts[-1]][0] > limit and i > firsts[-1]:
            firsts.append(i)
    buckets = []
    for index, (first, last) in enumerate(zip(firsts, [*firsts[1:], len(tensors)], strict=True)):
        begin = tensors[first][0]
        end = tensors[last][0] if last < len(tensors) else flat.numel()
        views = [flat[s : s + torch.Size(shape).numel()].view(shape) for s, shape in tensors[first:last]]
        buckets.append(_bucket(index, last == len(tensors), flat[begin:end], views))
    return buckets


def _bucket(index: int, last: bool, flat: Tensor, views: list[Tensor]) -> Any:
    """The methods of torch's `GradBucket` that hooks call; torch creates that class in C++ only."""
    return SimpleNamespace(
        index=lambda: index, is_last=lambda: last, buffer=lambda: flat, gradients=lambda: views
    )
