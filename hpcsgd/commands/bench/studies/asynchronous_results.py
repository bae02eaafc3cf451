"""Goals of `hpcsgd bench async`."""

from __future__ import annotations

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench.studies import time_to_loss
from hpcsgd.commands.bench.studies.trials import goal_line
from hpcsgd.commands.bench.studies.workloads import FAST, StudyCondition

_MAX_LOSS = 0.5  # percentage points of accuracy that asynchrony may cost
#: Largest ratio of LASGD's time to the target to all-reduce's, by (fast link?, number of slow ranks).
_MAX_RATIO = {(True, 0): 1.05, (True, 1): 0.4, (False, 0): 0.35}


class AsyncStudy(time_to_loss.TimeToLossStudy):
    """All-reduce, local SGD, gossip and LASGD."""

    name = "async"
    slow_ranks = 1
    baseline = "allreduce"

    def goals(self) -> list[str]:
        """The goals of LASGD with the measured values, under conditions where it and all-reduce have run."""
        lines = []
        for condition in self.conditions:
            method = next((m for m in self.methods if _is_adaptive(m) and self.trials_of(condition, m)), None)
            if method and self.trials_of(condition, self.baseline):
                limit = _MAX_RATIO.get((condition.link == FAST, condition.slow_ranks))
                lines += [] if limit is None else [self.time_goal(condition, method, limit)]
                lines.append(self._accuracy_goal(condition, method))
        return lines

    def _accuracy_goal(self, condition: StudyCondition, method: str) -> str:
        accuracy, baseline = (float(np.mean(self.accuracies(condition, m))) for m in (method, self.baseline))
        goal = f"final accuracy of {method} at most {_MAX_LOSS} points below {self.baseline}"
        measured = f"{accuracy:.2f} against {baseline:.2f} %"
        return goal_line(condition, goal, measured, baseline - accuracy <= _MAX_LOSS)


def _is_adaptive(method: str) -> bool:
    """Whether the method is LASGD with an adaptive period, to which the goals apply."""
    name, options = registry.parse(method)
    return name == "lasgd" and options.get("period", "auto") == "auto"
