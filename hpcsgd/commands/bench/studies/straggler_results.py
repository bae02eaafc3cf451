"""What `hpcsgd bench straggler` shows, writes and draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies import trials
from hpcsgd.commands.bench.studies.comparison import Cells, Comparison, Measure
from hpcsgd.commands.bench.studies.trials import Numbers, goal, or_never

_NOTES = (
    "Delays are simulated: each rank sleeps for each gradient. cb-Full is backup:backups=0, cb-DyBW backup; "
    "an iteration of theirs is a round of those that are done, one of adpsgd as many gradients as there are "
    "ranks. Times are without evaluation; medians over the seeds."
)


class Trial(trials.Trial[str]):
    """One run under a delay; its target is a test accuracy."""

    def reached(self, target: float) -> tuple[float, float]:
        """At the first evaluation that is there."""
        found = np.flatnonzero(self.test.accuracy >= target)
        if not len(found):
            return np.inf, np.inf
        return float(self.test.step[found[0]]), float(self.test.time[found[0]])


class Study(Comparison[str, Trial]):
    """All runs of a study.

    Parameters
    ----------
    trials
        Its runs: for each delay and method one a seed.
    target
        Test accuracy, from 0 to 1.
    on
        What they ran on, in words.
    """

    name = "straggler"
    measure = Measure("accuracy", "test accuracy (%)", ".1f", scale=100)
    columns = 2
    notes = _NOTES

    def __init__(self, trials: Sequence[Trial], target: float, on: str) -> None:
        super().__init__(trials)
        self._target, self._on = target, on
        self.full = next((m for m in self.methods if _backups(m) == "0"), None)
        self.dynamic = next((m for m in self.methods if _backups(m) == "dynamic"), None)

    def target(self, setting: str) -> float:
        return self._target

    def title(self, setting: str) -> str:
        return f"simulated delays {setting}; {self._on}; target {self._target:.1%}"

    def relative(self, setting: str, found: Numbers) -> Cells:
        relative = found.seconds / self.numbers(setting, self.full).seconds if self.full else None
        return {"relative to\ncb-Full": "" if relative is None else f"{relative:.2f}"}

    def quality(self, setting: str, method: str) -> Cells:
        return {"final\naccuracy": f"{self.numbers(setting, method).accuracy:.1%}"}

    def goals(self) -> list[str]:
        """The goals of dynamic backup workers beside what was measured."""
        if self.full is None or self.dynamic is None:
            return []
        told = []
        for delay in self.settings:
            kind = registry.parse(delay)[0]
            numbers = {method: self.numbers(delay, method) for method in self.methods}
            ratio = numbers[self.dynamic].seconds / numbers[self.full].seconds
            if limit := {"slow": 0.5, "constant": 1.05}.get(kind):
                what = f"cb-DyBW at most {limit:.2f} of cb-Full's time per iteration"
                told.append(goal(delay, what, f"{ratio:.2f}", ratio <= limit))
            if kind == "slow":
                told.append(self._first(delay, numbers))
        return told

    def _first(self, delay: str, numbers: dict[str, Numbers]) -> str:
        """Whether the dynamic method is the first of all at the target."""
        times = {method: found.seconds_to_target for method, found in numbers.items()}
        mine = times.pop(self.dynamic or "")
        others = ", ".join(f"{method} {or_never(time, '.2f s')}" for method, time in times.items())
        said = f"{or_never(mine, '.2f s')}; {others}"
        return goal(delay, f"cb-DyBW first at {self._target:.1%}", said, mine < min(times.values()))

    def rows(self, facts: output.Row) -> list[output.Row]:
        """Lines of a CSV file, one a run."""
        return [
            {"simulated_delays": trial.setting, **trial.row(self._target), **facts} for trial in self.trials
        ]


def _backups(method: str) -> str | None:
    name, options = registry.parse(method)
    return options.get("backups", "dynamic") if name == "backup" else None
