"""Local SGD: steps alone, and every so often the mean of the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hpcsgd.collectives.reducer import reduction
from hpcsgd.errors import BadOption
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.replicas import OwnModels


class LocalSGD(OwnModels):
    """Each rank takes `period` steps of its own, then all models become their mean.

    Momentum and other optimizer state stay local. A rank that has run out of batches weighs less, by the
    steps it did not take. With period 1 and plain SGD this is `AllReduce`. With compression the ranks average
    what their models have changed since the last average, which all of them keep (as Basu et al., arXiv
    1906.02367); memory of two more models with error feedback, of one without.

    Parameters
    ----------
    period
        Steps between two averages, at least 1. Default 8.
    """

    def __init__(self, period: int = 8) -> None:
        if period < 1:
            raise BadOption("period of local SGD", expected="at least 1 step", got=period)
        self.period = period

    def options(self) -> dict[str, object]:
        return {"period": self.period}

    def attach(self, setting: Setting) -> None:
        setting.refuse("local SGD", virtual_nodes=True)
        super().attach(setting)
        self._since = 0
        self._own_steps = [0] * setting.world.size
        self._reduction = reduction(
            self.parameters.group, setting.algorithm, setting.compress, setting.seed, what="change"
        )
        self._average_before: list[Tensor] = (
            self.parameters.copy() if setting.compress and setting.world.size > 1 else []
        )

    def detach(self) -> None:
        del self._reduction
        super().detach()

    def step(self, update: Callable[[], None]) -> None:
        if self.setting.weight:
            update()
        self._since += 1
        self._own_steps = [a + b for a, b in zip(self._own_steps, self.setting.having, strict=True)]
        if self._since == self.period:
            self._average()
            self._since = 0
            self._own_steps = [0] * self.setting.world.size

    def _average(self) -> None:
        """The mean of the models, weighted by steps where ranks took unequal numbers of them."""
        buckets = self.parameters.group.buckets
        for bucket, before in zip(buckets, self._average_before, strict=False):
            bucket.flat.sub_(before)
        scale = 1.0 / self.setting.world.size
        if len(set(self._own_steps)) > 1:
            scale = 1.0
            share = self._own_steps[self.setting.world.rank] / sum(self._own_steps)
            for bucket in buckets:
                bucket.flat.mul_(share)
        for bucket in buckets:
            self._reduction.start(bucket, scale)
        self._reduction.finish()
        for bucket, before in zip(buckets, self._average_before, strict=False):
            before.copy_(bucket.flat.add_(before))

    def state_dict(self) -> dict[str, Any]:
        return {
            "since": self._since,
            "own_steps": list(self._own_steps),
            "average_before": [before.cpu().clone() for before in self._average_before],
            "reduction": self._reduction.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since, self._own_steps = int(state["since"]), list(state["own_steps"])
        for before, saved in zip(self._average_before, state["average_before"], strict=True):
            before.copy_(saved)
        self._reduction.load_state_dict(state["reduction"])
