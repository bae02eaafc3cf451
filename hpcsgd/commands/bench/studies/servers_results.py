"""Results and goals of `hpcsgd bench ps`."""

from __future__ import annotations

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench.studies import time_to_loss
from hpcsgd.commands.bench.studies.comparison import Cells
from hpcsgd.commands.bench.studies.workloads import EIGHT_WORKER_WORKLOADS, FAST, StudyCondition

_MAX_RATIO = 0.4  # of the time to the target to the baseline's, on a slow link


class ServerStudy(time_to_loss.TimeToLossStudy):
    """Parameter servers in each mode, with groups of one rank and of two, and all-reduce SGD."""

    name = "ps"
    slow_ranks = 2
    baseline = "ps:mode=sync,groups=8"
    workloads = EIGHT_WORKER_WORKLOADS
    notes = (
        f"{time_to_loss.TimeToLossStudy.notes} Bytes through the servers: pushes and replies of a whole run."
    )

    def final_cells(self, condition: StudyCondition, method: str) -> Cells:
        moved = np.median([trial.server_bytes for trial in self.trials_of(condition, method)])
        return {**super().final_cells(condition, method), "MB through\nthe servers": f"{moved / 1e6:.0f}"}

    def goals(self) -> list[str]:
        """The goal of elastic groups with the measured value, where they and the baseline ran; slow links."""
        grouped = [method for method in self.methods if _is_elastic_in_groups(method)]
        return [
            self.time_goal(condition, method, _MAX_RATIO)
            for condition in self.conditions
            for method in grouped
            if condition.link != FAST
            and self.trials_of(condition, method)
            and self.trials_of(condition, self.baseline)
        ]


def _is_elastic_in_groups(method: str) -> bool:
    name, options = registry.parse(method)
    return name == "ps" and options.get("mode") == "elastic" and options.get("groups") == "4"
