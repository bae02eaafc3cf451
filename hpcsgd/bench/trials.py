"""What studies of methods have in common: their runs, medians over the seeds, goals and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hpcsgd.bench import output
from hpcsgd.bench.study import Finished
from hpcsgd.report.curves import Curve, draw_curves
from hpcsgd.report.records import Evaluation, Floats
from hpcsgd.report.render import DASHES, PALETTE, Chart, Dashes, Panel, Place, draw, png, short, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

S = TypeVar("S")
T = TypeVar("T", bound="Trial[Any]")


@dataclass(frozen=True)
class Trial(Generic[S]):
    """One run: its setting, seed and method, and what came of it; a subclass says when it is at a target."""

    setting: S
    seed: int
    method: str
    finished: Finished

    @property
    def test(self) -> Evaluation:
        return self.finished.record.test

    @property
    def seconds(self) -> float:
        """Of an iteration."""
        return float(self.test.time[-1] / self.test.step[-1])

    @property
    def accuracy(self) -> float:
        return float(self.test.accuracy[-1])

    def reached(self, target: float) -> tuple[float, float]:
        """Iterations and seconds until the target; infinite where it was not reached."""
        raise NotImplementedError

    def row(self, target: float) -> output.Row:
        """Columns of a CSV file."""
        iterations, seconds = self.reached(target)
        return {
            "method": self.method,
            "seed": self.seed,
            "iterations": int(self.test.step[-1]),
            "ms_per_iteration": round(1e3 * self.seconds, 4),
            "target": target,
            "iterations_to_target": "" if np.isinf(iterations) else round(iterations),
            "seconds_to_target": "" if np.isinf(seconds) else round(seconds, 4),
            "accuracy": round(self.accuracy, 6),
            "fewest_gradients": min(self.finished.gradients),
            "most_gradients": max(self.finished.gradients),
        }


@dataclass(frozen=True)
class Numbers:
    """Of a method in a setting, medians over the seeds."""

    seconds: float
    accuracy: float
    iterations_to_target: float
    seconds_to_target: float
    gradients: tuple[float, float]


@dataclass(frozen=True)
class Measure:
    """A column of the evaluations, and how its values are written."""

    column: str
    label: str
    form: str
    scale: float = 1.0


class Study(Generic[S, T]):
    """All runs of a study; a subclass says what is shown of them.

    Parameters
    ----------
    trials
        Its runs: for each setting and method one a seed.

    Attributes
    ----------
    name
        Of its files.
    measure
        What its figure shows against time, and what the target is of.
    columns
        Panels in a row of the figure.
    """

    name: str
    measure: Measure
    columns: int

    def __init__(self, trials: Sequence[T]) -> None:
        self.trials = trials
        self.settings: list[S] = list(dict.fromkeys(trial.setting for trial in trials))
        self.methods = list(dict.fromkeys(trial.method for trial in trials))
        self._looks = [(PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]) for i in range(len(self.methods))]

    def target(self, setting: S) -> float:
        """Of the measure."""
        raise NotImplementedError

    def show(self) -> None:
        """Print the tables, and what became of the goals."""
        raise NotImplementedError

    def rows(self, facts: output.Row) -> list[output.Row]:
        """Lines of a CSV file, one a run."""
        raise NotImplementedError

    def of(self, setting: S, method: str) -> list[T]:
        """The runs of a method in a setting."""
        return [trial for trial in self.trials if (trial.setting, trial.method) == (setting, method)]

    def numbers(self, setting: S, method: str) -> Numbers:
        """Medians over the seeds; an even number of them may give what no run had."""
        trials = self.of(setting, method)
        reached = [trial.reached(self.target(setting)) for trial in trials]
        gradients = [trial.finished.gradients for trial in trials]
        return Numbers(
            _median([trial.seconds for trial in trials]),
            _median([trial.accuracy for trial in trials]),
            _median([iterations for iterations, _ in reached]),
            _median([seconds for _, seconds in reached]),
            (_median([min(g) for g in gradients]), _median([max(g) for g in gradients])),
        )

    def publish(self, out: Path, facts: output.Row) -> None:
        """Show the study; write its CSV file and its figure."""
        self.show()
        csv = out / f"{self.name}.csv"
        output.write_csv(csv, self.rows(facts))
        print(csv, self.plot(out), sep="\n", flush=True)

    def plot(self, folder: Path) -> Path:
        """Draw the figure: the measure against time."""
        with style():
            from matplotlib.lines import Line2D

            handles = [Line2D([], [], color=color, linestyle=dashes) for color, dashes in self._looks]
            legend = list(zip(handles, self.methods, strict=True))
            return png(draw(Chart(self.name, "", self.panels(), legend), self.columns), folder)

    def panels(self) -> list[Panel]:
        """One for each setting."""
        return [partial(self.panel, setting=setting) for setting in self.settings]

    def panel(self, axes: Axes, place: Place, *, setting: S) -> None:
        """Draw a curve for each method that has runs in a setting."""
        looks = zip(self.methods, self._looks, strict=True)
        curves = [self._curve(runs, look) for method, look in looks if (runs := self.of(setting, method))]
        draw_curves(
            axes,
            place,
            xlabel="seconds, with simulated delays",
            ylabel=self.measure.label,
            curves=curves,
            log=False,
            write=lambda value: format(value, self.measure.form),
        )
        axes.axhline(self.measure.scale * self.target(setting), color="#808080", linewidth=0.6)
        axes.set_title(short(str(setting)))

    def _curve(self, runs: Sequence[T], look: tuple[str, Dashes]) -> Curve:
        """Medians over the seeds of time and measure at each evaluation."""
        columns = ("time", self.measure.column)
        times, values = (np.median([getattr(run.test, k) for run in runs], axis=0) for k in columns)
        return Curve(times, self.measure.scale * values, *look)


def goal(where: object, what: str, measured: str, met: bool) -> str:
    """A goal beside what was measured."""
    return f"Goal, {where}: {what}. Measured: {measured}: {'met' if met else 'not met'}."


def or_never(value: float, form: str) -> str:
    """A number, with the unit after the blank of its form; what is infinite never came."""
    number, _, unit = form.partition(" ")
    return "never" if np.isinf(value) else f"{value:{number}} {unit}".strip()


def spread(values: Sequence[float] | Floats, form: str) -> str:
    """Mean ± standard deviation; those of one value without."""
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):{form}}"


def deviation(values: Sequence[float] | Floats) -> float:
    """The standard deviation; 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
