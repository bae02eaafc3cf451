"""Local SGD: steps alone, and every so often the mean of the models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hpcsgd.collectives import allreduce
from hpcsgd.errors import BadOption
from hpcsgd.parameters import Parameters
from hpcsgd.strategies.base import Setting, Strategy


class LocalSGD(Strategy):
    """Each rank takes `period` steps of its own, then all models become their mean.

    Momentum and other optimizer state stay local. A rank that has run out of batches weighs less, by the
    steps it did not take. With period 1 and plain SGD this is `AllReduce`.

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
        super().attach(setting)
        self._since = 0
        self._own_steps = [0] * setting.world.size
        self.parameters = Parameters(setting.world, setting.parameters, setting.bucket_mib)

    def detach(self) -> None:
        self.parameters.release()
        del self.parameters  # the last view of the shared window, which can then be freed

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
        scale = None
        if len(set(self._own_steps)) > 1:
            scale = 1.0
            share = self._own_steps[self.setting.world.rank] / sum(self._own_steps)
            for bucket in self.parameters.group:
                bucket.flat.mul_(share)
        allreduce(self.parameters.group, scale, self.setting.algorithm)

    def averaged(self) -> AbstractContextManager[None]:
        return self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        own = self.parameters.copy()
        allreduce(self.parameters.group, algorithm=self.setting.algorithm)
        try:
            yield
        finally:
            self.parameters.restore(own)

    def consensus_distance(self) -> float:
        own = self.parameters.copy()
        with self.averaged():
            squared = self.parameters.squared_distance(own)
        world = self.setting.world
        return math.sqrt(sum(world.gather(squared)) / world.size)

    def state_dict(self) -> dict[str, Any]:
        return {"since": self._since, "own_steps": list(self._own_steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since, self._own_steps = int(state["since"]), list(state["own_steps"])
