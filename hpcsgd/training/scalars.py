"""Numbers and decisions that all ranks share: means for logs, early stopping; busy ranks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from hpcsgd.mpi.world import World
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.training.loops import check_between_loops


class Scalars:
    """The methods of `Run` that combine a number or a flag of each rank."""

    world: World
    strategy: Strategy
    _context: StrategyContext

    def mean(self, value: Any) -> float:
        """Return the mean over the ranks that compute gradients, the same on all ranks; collective.

        Parameters
        ----------
        value
            A number, or a tensor of one element.
        """
        values = self._gather(_number(value), "run.mean()")
        return math.fsum(values) / len(values)

    def any(self, flag: Any) -> bool:
        """Return whether the flag is true on a rank that computes gradients; collective."""
        return any(self._gather(bool(flag), "run.any()"))

    def all(self, flag: Any) -> bool:
        """Return whether the flag is true on all ranks that compute gradients; collective."""
        return all(self._gather(bool(flag), "run.all()"))

    def busy(self, activity: str) -> AbstractContextManager[None]:
        """Context manager for long work of one rank alone, for example a validation.

        The other ranks wait for it beyond their deadline, as long as its process lives.

        Parameters
        ----------
        activity
            Name of the work, for warnings.
        """
        return self.world.busy(activity)

    def _gather(self, value: Any, call: str) -> list[Any]:
        return self._meet(call, value)[: self.strategy.workers(self.world.size)]

    def _meet(self, call: str, value: Any = None) -> list[Any]:
        """Return the values of all ranks in a call that all make, outside of asynchronous loops."""
        check_between_loops(self._context, self.strategy, call)
        return self.world.meet(call, value)

    def _meet_quiescent(self, call: str) -> None:
        """Meet the other ranks in a call, and wait for the end of what is averaged in the background."""
        self._meet(call)
        self.strategy.quiesce()


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
