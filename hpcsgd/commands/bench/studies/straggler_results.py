"""Tables, CSV rows, plot and goals of `hpcsgd bench straggler`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies import trials
from hpcsgd.commands.bench.studies.comparison import Cells, Comparison, Metric
from hpcsgd.commands.bench.studies.trials import Medians, goal_line, or_never

_NOTES = (
    "Delays are simulated: each rank sleeps for each gradient. cb-Full: backup:backups=0; cb-DyBW: backup; "
    "their iterations average the gradients that are ready, an iteration of adpsgd is one gradient per rank "
    "on average. Times exclude evaluation; medians over the seeds."
)


class StragglerTrial(trials.Trial[str]):
    """One run under a simulated delay, with a target test accuracy."""

    def reached(self, target: float) -> tuple[float, float]:
        """Iterations and seconds to the first evaluation at the target; infinite if there is none."""
        above = np.flatnonzero(self.test.accuracy >= target)
        if not len(above):
            return np.inf, np.inf
        return float(self.test.step[above[0]]), float(self.test.time[above[0]])


class StragglerStudy(Comparison[str, StragglerTrial]):
    """All runs of the study.

    Parameters
    ----------
    trials
        The runs: one per delay, method and seed.
    target
        Target test accuracy, from 0 to 1.
    description
        Data set and ranks of the runs, for the tables.
    """

    name = "straggler"
    metric = Metric("accuracy", "test accuracy (%)", ".1f", scale=100)
    columns = 2
    notes = _NOTES

    def __init__(self, trials: Sequence[StragglerTrial], target: float, description: str) -> None:
        super().__init__(trials)
        self._target, self._description = target, description
        self.full = next((m for m in self.methods if _backups(m) == "0"), None)
        self.dynamic = next((m for m in self.methods if _backups(m) == "dynamic"), None)

    def target(self, condition: str) -> float:
        return self._target

    def title(self, condition: str) -> str:
        return f"simulated delays {condition}; {self._description}; target {self._target:.1%}"

    def relative_cells(self, condition: str, found: Medians) -> Cells:
        relative = found.seconds / self.medians(condition, self.full).seconds if self.full else None
        return {"relative to\ncb-Full": "" if relative is None else f"{relative:.2f}"}

    def quality_cells(self, condition: str, method: str) -> Cells:
        return {"final\naccuracy": f"{self.medians(condition, method).accuracy:.1%}"}

    def goals(self) -> list[str]:
        """The goals of dynamic backup workers with the measured values."""
        if self.full is None or self.dynamic is None:
            return []
        lines = []
        for delay in self.conditions:
            kind = registry.parse(delay)[0]
            medians = {method: self.medians(delay, method) for method in self.methods}
            ratio = medians[self.dynamic].seconds / medians[self.full].seconds
            if limit := {"slow": 0.5, "constant": 1.05}.get(kind):
                goal = f"time per iteration of cb-DyBW at most {limit:.2f} times that of cb-Full"
                lines.append(goal_line(delay, goal, f"{ratio:.2f}", ratio <= limit))
            if kind == "slow":
                lines.append(self._first_goal(delay, medians))
        return lines

    def _first_goal(self, delay: str, medians: dict[str, Medians]) -> str:
        """The goal that the dynamic method is the first to reach the target."""
        times = {method: found.seconds_to_target for method, found in medians.items()}
        dynamic = times.pop(self.dynamic or "")
        others = ", ".join(f"{method} {or_never(time, '.2f s')}" for method, time in times.items())
        measured = f"{or_never(dynamic, '.2f s')}; {others}"
        goal = f"cb-DyBW is the first to reach {self._target:.1%}"
        return goal_line(delay, goal, measured, dynamic < min(times.values()))

    def rows(self, environment: output.Row) -> list[output.Row]:
        """Rows of the CSV file, one per run."""
        return [
            {"simulated_delays": trial.condition, **trial.row(self._target), **environment}
            for trial in self.trials
        ]


def _backups(method: str) -> str | None:
    name, options = registry.parse(method)
    return options.get("backups", "dynamic") if name == "backup" else None
