"""Local SGD: local steps, and the mean of all models after every period."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.collectives.step_status import StepStatus
from hpcsgd.errors import HpcsgdError
from hpcsgd.registry.limits import Count
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.replicas import ReplicaStrategy


@dataclass(eq=False, repr=False)
class LocalSGD(ReplicaStrategy):
    """Local SGD: every rank takes `period` local steps, then all models are replaced by their mean.

    Momentum and other optimizer state stay local. Models are weighted by the steps their ranks have taken
    since the last average, so a rank that has run out of batches weighs less. With period 1 and plain SGD
    this equals `AllReduce`. With `run.step(weight=...)` they are weighted by the sums of these weights. With
    compression the ranks average the changes of their models since the last
    average, of which each holds a copy (as Basu et al., arXiv 1906.02367): memory of two more models with
    error feedback, of one without.

    Parameters
    ----------
    period
        Steps between two averages, at least 1. Default 8.
    """

    title = "local SGD"
    accepts_compression = accepts_weights = True

    period: Count = 8

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        self._steps_since_average = 0
        self._steps_of_rank = [0] * context.world.size
        #: Sum of the weights that the user has given to the steps of this rank since the last average.
        self._weight: float | None = None
        self._status = StepStatus(context.world)
        self._reducer = make_reducer(
            self.parameters.group, context.algorithm, context.compress, context.seed, kind="change"
        )
        self._last_average: list[Tensor] = (
            self.parameters.copy() if context.compress and context.world.size > 1 else []
        )

    def detach(self) -> None:
        del self._reducer
        super().detach()

    def has_equal_models(self) -> bool:
        return self._steps_since_average == 0

    def step(self, update: Callable[[], None]) -> None:
        weight = self.context.loop.weight
        if self.context.weight:
            update()
        if weight is not None:
            self._weight = (self._weight or 0.0) + weight * self.context.weight
        self._steps_since_average += 1
        self._steps_of_rank = [
            a + b for a, b in zip(self._steps_of_rank, self.context.batches.of_step, strict=True)
        ]
        if self._steps_since_average == self.period:
            self._average()
            self._steps_since_average, self._weight = 0, None
            self._steps_of_rank = [0] * self.context.world.size

    def _average(self) -> None:
        """Replace the model by the mean of all, weighted by steps if these are not equally many."""
        buckets = self.parameters.group.buckets
        for bucket, before in zip(buckets, self._last_average, strict=False):
            bucket.flat.sub_(before)
        weights, scale = self._weights(), 1.0 / self.context.world.size
        if len(set(weights)) > 1:
            scale = 1.0
            weight = weights[self.context.world.rank] / sum(weights)
            for bucket in buckets:
                bucket.flat.mul_(weight)
        for bucket in buckets:
            self._reducer.start(bucket, scale)
        self._reducer.finish()
        for bucket, before in zip(buckets, self._last_average, strict=False):
            before.copy_(bucket.flat.add_(before))

    def _weights(self) -> Sequence[float]:
        """Return the weights of all ranks in the average."""
        context = self.context
        numbers = {
            "number of steps": context.step,
            "number of batches": context.loop.batches,
            "use of run.step(weight=...)": self._weight is not None,
        }
        self._status.exchange(numbers, np.zeros(0, np.bool_), f"the status of step {context.step}")
        if self._weight is None:
            return self._steps_of_rank
        weights = context.world.gather(self._weight, "the weights of an average")
        return weights if any(weights) else self._steps_of_rank

    def state_dict(self) -> dict[str, Any]:
        return {
            "weight": self._weight,
            "since": self._steps_since_average,
            "own_steps": list(self._steps_of_rank),
            "average_before": [before.cpu().clone() for before in self._last_average],
            "reduction": self._reducer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps_since_average = int(state["since"])
        self._steps_of_rank = self._of_ranks(list(state["own_steps"]))
        self._weight = state.get("weight")
        for before, saved in zip(self._last_average, state["average_before"], strict=True):
            before.copy_(saved)
        self._reducer.load_state_dict(state["reduction"])

    def _of_ranks(self, steps: list[int]) -> list[int]:
        """Return the steps of each rank since the last average, from a state of any number of ranks."""
        size = self.context.world.size
        if len(steps) != size and any(steps):
            raise HpcsgdError(
                f"a state of local SGD from {len(steps)} ranks, {max(steps)} steps after an average",
                rank=self.context.world.global_rank,
                expected=f"{size} ranks, or a state right after an average",
                do=f"save the state after a multiple of {self.period} steps",
                everywhere=True,
            )
        return steps if len(steps) == size else [0] * size
