"""Closures of optimizers such as L-BFGS: their gradients and losses become the means of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext


def averaged_closure(
    closure: Callable[[], Any], strategy: Strategy, context: StrategyContext
) -> Callable[[], Any]:
    """Return a closure with the mean gradients and the mean loss, if the strategy averages gradients.

    So an optimizer makes the same decisions on all ranks: it takes the steps of one process with all data.
    """
    if not strategy.averages_gradients or context.world.size == 1:
        return closure

    def evaluate() -> Any:
        loss = closure()
        strategy.complete_gradients()
        return _mean_loss(loss, context)

    return evaluate


def _mean_loss(loss: Any, context: StrategyContext) -> Any:
    value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    share = context.weight * (1.0 if context.loop.weight is None else context.loop.weight)
    rows = context.world.gather((value * share, share), "the mean of the losses")
    mean = sum(row[0] for row in rows) / sum(row[1] for row in rows)
    return loss.detach().clone().fill_(mean) if isinstance(loss, Tensor) else mean
