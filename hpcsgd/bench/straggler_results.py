"""What `hpcsgd bench straggler` shows, writes and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcsgd import specs
from hpcsgd.bench import output
from hpcsgd.bench.study import Finished
from hpcsgd.report.curves import Curve, draw_curves
from hpcsgd.report.render import DASHES, PALETTE, Chart, Dashes, Place, draw, png, short, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2
_NOTES = (
    "Delays are simulated: each rank sleeps for each gradient. cb-Full is backup:backups=0, cb-DyBW backup; "
    "an iteration of theirs is a round of those that are done, one of adpsgd as many gradients as there are "
    "ranks. Times are without evaluation; medians over the seeds."
)


@dataclass(frozen=True)
class Trial:
    """One run: its delay, seed and method, and what came of it."""

    delay: str
    seed: int
    method: str
    finished: Finished

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        test = self.finished.record.test
        return float(test.time[-1] / test.step[-1])

    @property
    def accuracy(self) -> float:
        return float(self.finished.record.test.accuracy[-1])

    def reached(self, target: float) -> tuple[float, float]:
        """Iterations and seconds until an accuracy; infinite where it was not reached."""
        test = self.finished.record.test
        found = np.flatnonzero(test.accuracy >= target)
        return (float(test.step[found[0]]), float(test.time[found[0]])) if len(found) else (np.inf, np.inf)


@dataclass(frozen=True)
class Numbers:
    """Of a method under a delay, medians over the seeds."""

    seconds: float
    accuracy: float
    iterations_to_target: float
    seconds_to_target: float
    gradients: tuple[float, float]


class Study:
    """All runs of a study.

    Parameters
    ----------
    trials
        Its runs: for each delay and method one a seed.
    target
        Test accuracy, from 0 to 1.
    title
        On what they ran.
    """

    def __init__(self, trials: Sequence[Trial], target: float, title: str) -> None:
        self.trials, self.target, self.title = trials, target, title
        self.delays = list(dict.fromkeys(trial.delay for trial in trials))
        self.methods = list(dict.fromkeys(trial.method for trial in trials))
        self.full = next((m for m in self.methods if _backups(m) == "0"), None)
        self.dynamic = next((m for m in self.methods if _backups(m) == "dynamic"), None)

    def of(self, delay: str, method: str) -> list[Trial]:
        """The runs of a method under a delay."""
        return [trial for trial in self.trials if (trial.delay, trial.method) == (delay, method)]

    def numbers(self, delay: str, method: str) -> Numbers:
        """Medians over the seeds; an even number of them may give what no run had."""
        trials = self.of(delay, method)
        iterations, seconds = np.array([trial.reached(self.target) for trial in trials]).T
        gradients = [trial.finished.gradients for trial in trials]
        return Numbers(
            float(np.median([trial.seconds for trial in trials])),
            float(np.median([trial.accuracy for trial in trials])),
            float(np.median(iterations)),
            float(np.median(seconds)),
            (float(np.median([min(g) for g in gradients])), float(np.median([max(g) for g in gradients]))),
        )

    def show(self) -> None:
        """Print a table for each delay, and what became of the goals."""
        header = [
            "",
            "ms per\niteration",
            "relative to\ncb-Full",
            "iterations\nto target",
            "seconds\nto target",
        ]
        header += ["final\naccuracy", "gradients\nper rank"]
        for delay in self.delays:
            rows = [self._row(delay, method) for method in self.methods]
            title = f"simulated delays {delay}; {self.title}; target {self.target:.1%}"
            output.show(title, header, rows, _NOTES if delay == self.delays[-1] else "")
        for goal in self.goals():
            print(goal, flush=True)

    def _row(self, delay: str, method: str) -> list[str]:
        found = self.numbers(delay, method)
        relative = found.seconds / self.numbers(delay, self.full).seconds if self.full else np.nan
        return [
            method,
            f"{1e3 * found.seconds:.1f}",
            "" if np.isnan(relative) else f"{relative:.2f}",
            _or_never(found.iterations_to_target, ".0f"),
            _or_never(found.seconds_to_target, ".2f"),
            f"{found.accuracy:.1%}",
            "..".join(f"{number:.0f}" for number in dict.fromkeys(found.gradients)),
        ]

    def goals(self) -> list[str]:
        """The goals of dynamic backup workers beside what was measured."""
        if self.full is None or self.dynamic is None:
            return []
        told = []
        for delay in self.delays:
            kind = specs.parse(delay)[0]
            numbers = {method: self.numbers(delay, method) for method in self.methods}
            ratio = numbers[self.dynamic].seconds / numbers[self.full].seconds
            if kind == "slow":
                told.append(_goal(delay, "cb-DyBW at most 0.50 of cb-Full's time per iteration", ratio, 0.5))
                told.append(self._first(delay, numbers))
            elif kind == "constant":
                told.append(_goal(delay, "cb-DyBW at most 1.05 of cb-Full's time per iteration", ratio, 1.05))
        return told

    def _first(self, delay: str, numbers: dict[str, Numbers]) -> str:
        """Whether the dynamic method is the first of all at the target."""
        times = {method: found.seconds_to_target for method, found in numbers.items()}
        mine = times.pop(self.dynamic or "")
        verdict = "met" if mine < min(times.values()) else "not met"
        others = ", ".join(f"{method} {_or_never(time, '.2f s')}" for method, time in times.items())
        said = f"{_or_never(mine, '.2f s')}; {others}"
        return f"Goal, {delay}: cb-DyBW first at {self.target:.1%}. Measured: {said}: {verdict}."

    def rows(self, facts: output.Row) -> list[output.Row]:
        """Lines of a CSV file, one a run."""
        return [self._line(trial) | facts for trial in self.trials]

    def _line(self, trial: Trial) -> output.Row:
        iterations, seconds = trial.reached(self.target)
        return {
            "simulated_delays": trial.delay,
            "method": trial.method,
            "seed": trial.seed,
            "iterations": int(trial.finished.record.test.step[-1]),
            "ms_per_iteration": round(1e3 * trial.seconds, 4),
            "target": self.target,
            "iterations_to_target": "" if np.isinf(iterations) else int(iterations),
            "seconds_to_target": "" if np.isinf(seconds) else round(seconds, 4),
            "accuracy": round(trial.accuracy, 6),
            "fewest_gradients": min(trial.finished.gradients),
            "most_gradients": max(trial.finished.gradients),
        }

    def plot(self, folder: Path) -> Path:
        """Draw `straggler.png`: accuracy against time, a panel for each delay."""
        with style():
            from matplotlib.lines import Line2D

            looks = [(PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]) for i in range(len(self.methods))]
            handles = [Line2D([], [], color=color, linestyle=dashes) for color, dashes in looks]
            panels = [partial(self._panel, delay=delay, looks=looks) for delay in self.delays]
            legend = list(zip(handles, self.methods, strict=True))
            return png(draw(Chart("straggler", "", panels, legend), _COLUMNS), folder)

    def _panel(self, axes: Axes, place: Place, *, delay: str, looks: Sequence[tuple[str, Dashes]]) -> None:
        curves = [self._curve(delay, *pair) for pair in zip(self.methods, looks, strict=True)]
        draw_curves(
            axes,
            place,
            xlabel="seconds, with simulated delays",
            ylabel="test accuracy (%)",
            curves=curves,
            log=False,
            write=lambda value: f"{value:.1f}",
        )
        axes.axhline(100 * self.target, color="#808080", linewidth=0.6)
        axes.set_title(short(delay))

    def _curve(self, delay: str, method: str, look: tuple[str, Dashes]) -> Curve:
        """Medians of time and accuracy at each evaluation."""
        tests = [trial.finished.record.test for trial in self.of(delay, method)]
        times, accuracies = (np.median([getattr(t, k) for t in tests], axis=0) for k in ("time", "accuracy"))
        return Curve(times, 100 * accuracies, *look)


def _backups(method: str) -> str | None:
    name, options = specs.parse(method)
    return options.get("backups", "dynamic") if name == "backup" else None


def _goal(delay: str, goal: str, ratio: float, limit: float) -> str:
    return f"Goal, {delay}: {goal}. Measured: {ratio:.2f}: {'met' if ratio <= limit else 'not met'}."


def _or_never(value: float, form: str) -> str:
    number, _, unit = form.partition(" ")
    return "never" if np.isinf(value) else f"{value:{number}} {unit}".strip()
