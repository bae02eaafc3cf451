"""`torch.nn.SyncBatchNorm` over MPI: statistics of the batches of all ranks."""

from __future__ import annotations

import copyreg
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hpcsgd.errors import BadOption
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.dsgd import DSGD
from hpcsgd.strategies.local_sgd import LocalSGD
from hpcsgd.strategies.sgp import SGP

_STEPS_TOGETHER = (AllReduce, LocalSGD, DSGD, SGP)

#: The ranks with which an attached module computes its statistics, while their run exists.
_links: weakref.WeakKeyDictionary[nn.Module, weakref.ref[SyncBatchNorms]] = weakref.WeakKeyDictionary()


class SyncBatchNorms:
    """Makes the `SyncBatchNorm` modules of a model work over MPI, on any device, until `detach`.

    In training each computes the statistics of the batches of all ranks together, as one process would of the
    concatenated batch, whatever their sizes; a rank that only repeats a batch with weight 0 does not count. A
    single rank, modules of subclasses, and models of a `torch.distributed` job are left alone. Copies of the
    model are plain.

    Raises
    ------
    BadOption
        On all ranks, if the ranks do not take their steps together, or have virtual nodes.
    """

    def __init__(self, model: nn.Module, context: StrategyContext, strategy: Strategy) -> None:
        self.context = context
        found = [(name, m) for name, m in model.named_modules() if type(m) is nn.SyncBatchNorm]
        elsewhere = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._modules = {} if context.world.size == 1 or elsewhere else dict(found)
        if not self._modules:
            return
        if not isinstance(strategy, _STEPS_TOGETHER) or context.peers.per_rank > 1:
            raise BadOption(
                "SyncBatchNorm needs ranks that compute each step together",
                expected="strategy " + ", ".join(each.__name__ for each in _STEPS_TOGETHER),
                got=type(strategy).__name__ + ", with virtual nodes" * (context.peers.per_rank > 1),
                do="use one of these strategies, or BatchNorm in place of SyncBatchNorm",
                everywhere=True,
            )
        # Of its own, for the other thread reduces buckets at the same time.
        self._communicator = context.world.all.dup("sync batch norm")
        self._names: dict[nn.Module, str] = {module: name for name, module in found}
        for module in self._modules.values():
            module.__class__ = _SyncBatchNorm
            _links[module] = weakref.ref(self)

    def detach(self) -> None:
        """Make the modules plain ones."""
        for module in self._modules.values():
            module.__class__ = nn.SyncBatchNorm
            _links.pop(module, None)
        self._modules = {}

    def gather(self, module: nn.Module, values: Tensor) -> Tensor:
        """Return a float64 tensor of every rank, one in each row, on its device."""
        operation = f"SyncBatchNorm {self._names[module]!r} at step {self.context.step}"
        local = values.detach().cpu().numpy()
        rows = np.empty((self._communicator.size, local.size))
        with self.context.world.progress.waiting(operation):
            self._communicator.wait(self._communicator.iallgather(local, rows), operation)
        return torch.from_numpy(rows).to(values.device)


class _SyncBatchNorm(nn.SyncBatchNorm):
    """A module that is attached; copies and pickled ones are plain."""

    def forward(self, input: Tensor) -> Tensor:
        reference = _links.get(self)
        link = reference() if reference is not None else None
        if link is None or not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        output, mean, variance, count = _Normalize.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.eps, self, link
        )
        if self.track_running_stats:
            self._update(mean, variance, float(count))
        return output  # type: ignore[no-any-return]

    @torch.no_grad()
    def _update(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = nn.SyncBatchNorm, object, None
        return copyreg._reconstructor, plain, self.__dict__  # type: ignore[attr-defined]


class _Normalize(torch.autograd.Function):
    """Normalization by the mean and variance over all ranks, which it returns too, with the count."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        module: nn.Module,
        link: SyncBatchNorms,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        counts = bool(link.context.batch_weight) and input.numel() > 0
        mean, variance, count = _statistics(input if counts else input[:0], module, link)
        wide = torch.promote_types(input.dtype, torch.float32)
        shape = [1, -1, *[1] * (input.dim() - 2)]
        scale = (variance + eps).rsqrt()
        normalized = (input.to(wide) - mean.to(wide).view(shape)) * scale.to(wide).view(shape)
        output = normalized
        if weight is not None:
            output = output * weight.to(wide).view(shape)
        if bias is not None:
            output = output + bias.to(wide).view(shape)
        ctx.save_for_backward(normalized, weight, scale, count)
        ctx.module, ctx.link, ctx.counts, ctx.dtype = module, link, counts, input.dtype
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(input.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: object) -> Any:
        normalized, weight, scale, count = ctx.saved_tensors
        gradient = gradient.to(normalized.dtype)
        dims = [dim for dim in range(gradient.dim()) if dim != 1]
        shape = [1, -1, *[1] * (gradient.dim() - 2)]
        sums = torch.cat([gradient.sum(dims).double(), (gradient * normalized).sum(dims).double()])
        grad_bias, grad_weight = sums.to(normalized.dtype).chunk(2)
        result = None
        if ctx.needs_input_grad[0]:
            totals = ctx.link.gather(ctx.module, sums * ctx.counts).sum(0) / count.clamp(min=1)
            mean_gradient, mean_product = (part.to(gradient.dtype).view(shape) for part in totals.chunk(2))
            result = gradient - mean_gradient - normalized * mean_product
            factor = scale if weight is None else scale * weight
            result = (result * factor.to(gradient.dtype).view(shape)).to(ctx.dtype)
        needs = ctx.needs_input_grad
        return (
            result,
            grad_weight.to(weight.dtype) if weight is not None and needs[1] else None,
            grad_bias.to(weight.dtype) if weight is not None and needs[2] else None,
            None,
            None,
            None,
        )


def _statistics(input: Tensor, module: nn.Module, link: SyncBatchNorms) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, biased variance and count a channel over all ranks, in float64, in the same bits."""
    dims = [dim for dim in range(input.dim()) if dim != 1]
    local = torch.zeros(2 * input.shape[1] + 1, dtype=torch.float64, device=input.device)
    if input.numel():
        wide = input.double()
        variance, mean = torch.var_mean(wide, dims, correction=0)
        local = torch.cat([mean, variance, local.new_full((1,), input.numel() / input.shape[1])])
    rows = link.gather(module, local)
    counts, (means, variances) = rows[:, -1:], rows[:, :-1].chunk(2, 1)
    count = counts.sum()
    if count == 1:
        raise ValueError("Expected more than 1 value per channel when training, got 1 of all ranks")
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(0)
    # The variance of the whole: the mean of those of its parts, and that of their means.
    return mean, (share * (variances + (means - mean).square())).sum(0), count
