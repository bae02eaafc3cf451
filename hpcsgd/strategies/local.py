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

    Momentum and other optimizer state stay local. With period 1 and plain SGD this is `AllReduce`.

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
        self.parameters = Parameters(setting.world, setting.parameters, setting.bucket_mib)

    def detach(self) -> None:
        self.parameters.release()
        del self.parameters  # the last view of the shared window, which can then be freed

    def step(self, update: Callable[[], None]) -> None:
        if self.setting.weight:
            update()
        self._since += 1
        if self._since == self.period:
            self._since = 0
            allreduce(self.parameters.group, algorithm=self.setting.algorithm)

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
        return {"since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._since = int(state["since"])
