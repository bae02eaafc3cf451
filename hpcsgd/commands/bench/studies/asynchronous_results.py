"""What `hpcsgd bench async` was to show."""

from __future__ import annotations

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench.studies import time_to_loss
from hpcsgd.commands.bench.studies.trials import goal
from hpcsgd.commands.bench.studies.workloads import FAST, Setting

_POINTS = 0.5  # of accuracy that asynchrony may cost
#: LASGD's time to the target over all-reduce's, at most: on a fast link or not, with a slow rank or not.
_LIMITS = {(True, 0): 1.05, (True, 1): 0.4, (False, 0): 0.35}


class Study(time_to_loss.Study):
    """All-reduce, local SGD, gossip and LASGD; see `losses.Study`."""

    name = "async"
    slow = 1
    baseline = "allreduce"

    def goals(self) -> list[str]:
        """The goals of LASGD beside what was measured, where it and all-reduce have run."""
        told = []
        for setting in self.settings:
            method = next((m for m in self.methods if _is_adaptive(m) and self.of(setting, m)), None)
            if method and self.of(setting, self.baseline):
                limit = _LIMITS.get((setting.link == FAST, setting.slow))
                told += [] if limit is None else [self.sooner(setting, method, limit)]
                told.append(self._accuracy(setting, method))
        return told

    def _accuracy(self, setting: Setting, method: str) -> str:
        mine, base = (float(np.mean(self.percent(setting, m))) for m in (method, self.baseline))
        what = f"final accuracy of {method} at most {_POINTS} points below {self.baseline}'s"
        return goal(setting, what, f"{mine:.2f} to {base:.2f} %", base - mine <= _POINTS)


def _is_adaptive(method: str) -> bool:
    """Whether it is LASGD that finds its period by itself, of which the goals speak."""
    name, options = registry.parse(method)
    return name == "lasgd" and options.get("period", "auto") == "auto"
