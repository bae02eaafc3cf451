"""Comparison of the time in which each method reaches a target: a table and a panel per condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hpcsgd.commands.bench.output import Column, Results
from hpcsgd.commands.bench.studies.comparison import Comparison, Trial
from hpcsgd.commands.report.curves import Curve, draw_curves
from hpcsgd.commands.report.figures import Panel, PanelPosition, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

S = TypeVar("S")


@dataclass(frozen=True)
class TargetTrial(Trial[S]):
    """One run with a target; a subclass defines how it is reached."""

    target: float

    @property
    def reached(self) -> tuple[float, float]:
        """Iterations and seconds to the target; infinite if it was not reached."""
        raise NotImplementedError


T = TypeVar("T", bound=TargetTrial[Any])


@dataclass(frozen=True)
class Metric:
    """A column of the evaluation records, its axis label, the format of its values, and their scale."""

    column: str
    label: str
    format: str
    scale: float = 1.0


@dataclass(frozen=True)
class Runs(Generic[S, T]):
    """The runs of a method under a condition, one per seed."""

    condition: S
    method: str
    trials: list[T]

    def median(self, of: Callable[[T], float]) -> float:
        """The median over the seeds; with an even number of seeds possibly the value of no run."""
        return float(np.median([of(trial) for trial in self.trials]))

    @property
    def seconds(self) -> float:
        """Median seconds per iteration."""
        return self.median(lambda trial: trial.seconds)

    @property
    def reached(self) -> tuple[float, float]:
        """Median iterations and seconds to the target."""
        return self.median(lambda trial: trial.reached[0]), self.median(lambda trial: trial.reached[1])

    @property
    def gradients(self) -> tuple[float, float]:
        """Median number of gradients of the workers with the fewest and the most."""
        return self.median(lambda trial: min(trial.gradients)), self.median(
            lambda trial: max(trial.gradients)
        )


class TimeToTarget(Comparison[S, T]):
    """All runs of a study, whose figure shows a metric against time; a subclass defines further columns."""

    metric: Metric
    notes: str  # below the last table

    def title(self, condition: S) -> str:
        """The title of a condition's table."""
        raise NotImplementedError

    def further_columns(self) -> list[Column[Runs[S, T]]]:
        """Columns of the tables after the time to the target."""
        raise NotImplementedError

    def runs(self, condition: S, method: str) -> Runs[S, T]:
        """The runs of a method under a condition."""
        return Runs(condition, method, self.trials_of(condition, method))

    def tables(self) -> Iterator[Results[Runs[S, T]]]:
        """A table per condition, of the methods that have runs under it."""
        columns: list[Column[Runs[S, T]]] = [
            Column(lambda r: r.method, heading=""),
            Column(lambda r: 1e3 * r.seconds, heading="ms per\niteration", form=".1f"),
            Column(lambda r: r.reached[0], heading="iterations\nto target", form=".0f"),
            Column(lambda r: r.reached[1], heading="seconds\nto target", form=".2f"),
            *self.further_columns(),
            Column(lambda r: dict.fromkeys(r.gradients), heading="gradients\nper worker", form=_range),
        ]
        for condition in self.conditions:
            found = [self.runs(condition, m) for m in self.methods if self.trials_of(condition, m)]
            notes = self.notes if condition == self.conditions[-1] else ""
            yield Results(columns, found, self.title(condition), notes)

    def columns(self) -> list[Column[T]]:
        """Columns of the CSV file that these studies share."""
        return [
            Column(lambda t: t.method, "method"),
            Column(lambda t: t.seed, "seed"),
            Column(lambda t: t.iterations, "iterations"),
            Column(lambda t: 1e3 * t.seconds, "ms_per_iteration"),
            Column(lambda t: t.target, "target", digits=9),
            Column(lambda t: t.reached[0], "iterations_to_target", digits=None),
            Column(lambda t: t.reached[1], "seconds_to_target"),
            Column(lambda t: t.accuracy, "accuracy", digits=6),
            Column(lambda t: min(t.gradients), "fewest_gradients"),
            Column(lambda t: max(t.gradients), "most_gradients"),
        ]

    def panels(self) -> list[Panel]:
        """One panel per condition."""
        return [partial(self.panel, condition=condition) for condition in self.conditions]

    def panel(self, axes: Axes, position: PanelPosition, *, condition: S) -> None:
        """Draw a curve for each method that has runs under a condition."""
        curves = [
            self._curve(runs, **line_style)
            for method, line_style in self.line_styles.items()
            if (runs := self.trials_of(condition, method))
        ]
        draw_curves(
            axes,
            position,
            xlabel="seconds, with simulated delays",
            ylabel=self.metric.label,
            curves=curves,
            log=False,
            format_value=lambda value: format(value, self.metric.format),
        )
        target = next(trial.target for trial in self.trials if trial.condition == condition)
        axes.axhline(self.metric.scale * target, color="#808080", linewidth=0.6)
        axes.set_title(short(str(condition)))

    def _curve(self, runs: Sequence[T], color: str, linestyle: Any) -> Curve:
        """Medians over the seeds of time and metric at each evaluation."""
        columns = ("time", self.metric.column)
        times, values = (np.median([getattr(run.test, k) for run in runs], axis=0) for k in columns)
        return Curve(times, self.metric.scale * values, color, linestyle)


def _range(numbers: dict[float, None]) -> str:
    return "..".join(f"{number:.0f}" for number in numbers)
