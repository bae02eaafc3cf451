"""Comparison of methods under several conditions: a table and a panel per condition, and goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.trials import Medians, Trial, median, or_never
from hpcsgd.commands.report.curves import Curve, draw_curves
from hpcsgd.commands.report.figures import (
    DASHES,
    PALETTE,
    Chart,
    Dashes,
    Panel,
    PanelPosition,
    draw,
    png,
    short,
    style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

S = TypeVar("S")
T = TypeVar("T", bound=Trial[Any])
#: Texts under their columns' names.
Cells = dict[str, str]


@dataclass(frozen=True)
class Metric:
    """A column of the evaluation records, its axis label, the format of its values, and their scale."""

    column: str
    label: str
    format: str
    scale: float = 1.0


class Comparison(Generic[S, T]):
    """All runs of a study; a subclass defines its tables, target and goals.

    Parameters
    ----------
    trials
        The runs: one per condition, method and seed.

    Attributes
    ----------
    name
        Name of the study's files.
    metric
        The metric that the figure shows against time, and of the target.
    columns
        Number of panels in a row of the figure.
    notes
        Notes below the last table.
    """

    name: str
    metric: Metric
    columns: int
    notes: str

    def __init__(self, trials: Sequence[T]) -> None:
        self.trials = trials
        self.conditions: list[S] = list(dict.fromkeys(trial.condition for trial in trials))
        self.methods = list(dict.fromkeys(trial.method for trial in trials))
        self._line_styles = [
            (PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]) for i in range(len(self.methods))
        ]

    def target(self, condition: S) -> float:
        """The target value of the metric."""
        raise NotImplementedError

    def title(self, condition: S) -> str:
        """The title of a condition's table."""
        raise NotImplementedError

    def relative_cells(self, condition: S, found: Medians) -> Cells:
        """Further cells next to the time per iteration."""
        return {}

    def quality_cells(self, condition: S, method: str) -> Cells:
        """Further cells next to the time to the target."""
        raise NotImplementedError

    def goals(self) -> list[str]:
        """A line per goal, with the measured value."""
        raise NotImplementedError

    def rows(self, environment: output.Row) -> list[output.Row]:
        """Rows of the CSV file, one per run."""
        raise NotImplementedError

    def trials_of(self, condition: S, method: str) -> list[T]:
        """The runs of a method under a condition."""
        return [trial for trial in self.trials if (trial.condition, trial.method) == (condition, method)]

    def medians(self, condition: S, method: str) -> Medians:
        """Medians over the seeds; with an even number of seeds possibly the value of no run."""
        trials = self.trials_of(condition, method)
        reached = [trial.reached(self.target(condition)) for trial in trials]
        gradients = [trial.gradients for trial in trials]
        return Medians(
            median([trial.seconds for trial in trials]),
            median([trial.accuracy for trial in trials]),
            median([iterations for iterations, _ in reached]),
            median([seconds for _, seconds in reached]),
            (median([min(g) for g in gradients]), median([max(g) for g in gradients])),
        )

    def show(self) -> None:
        """Print a table per condition, and the goals."""
        for condition in self.conditions:
            ran = [method for method in self.methods if self.trials_of(condition, method)]
            rows = {method: self._cells(condition, method) for method in ran}
            header = ["", *next(iter(rows.values()))]
            lines = [[method, *cells.values()] for method, cells in rows.items()]
            notes = self.notes if condition == self.conditions[-1] else ""
            output.print_table(self.title(condition), header, lines, notes)
        for goal in self.goals():
            print(goal, flush=True)

    def _cells(self, condition: S, method: str) -> Cells:
        found = self.medians(condition, method)
        return {
            "ms per\niteration": f"{1e3 * found.seconds:.1f}",
            **self.relative_cells(condition, found),
            "iterations\nto target": or_never(found.iterations_to_target, ".0f"),
            "seconds\nto target": or_never(found.seconds_to_target, ".2f"),
            **self.quality_cells(condition, method),
            "gradients\nper worker": "..".join(f"{number:.0f}" for number in dict.fromkeys(found.gradients)),
        }

    def publish(self, out: Path, environment: output.Row) -> None:
        """Print the tables; write the CSV file and the figure into `out`."""
        self.show()
        csv = out / f"{self.name}.csv"
        output.write_csv(csv, self.rows(environment))
        print(csv, png(self.figure(), out), sep="\n", flush=True)

    def figure(self) -> Figure:
        """The metric against time."""
        with style():
            from matplotlib.lines import Line2D

            handles = [Line2D([], [], color=color, linestyle=dashes) for color, dashes in self._line_styles]
            legend = list(zip(handles, self.methods, strict=True))
            return draw(Chart(self.name, "", self.panels(), legend), self.columns)

    def panels(self) -> list[Panel]:
        """One panel per condition."""
        return [partial(self.panel, condition=condition) for condition in self.conditions]

    def panel(self, axes: Axes, position: PanelPosition, *, condition: S) -> None:
        """Draw a curve for each method that has runs under a condition."""
        styles = zip(self.methods, self._line_styles, strict=True)
        curves = [
            self._curve(runs, line_style)
            for method, line_style in styles
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
        axes.axhline(self.metric.scale * self.target(condition), color="#808080", linewidth=0.6)
        axes.set_title(short(str(condition)))

    def _curve(self, runs: Sequence[T], line_style: tuple[str, Dashes]) -> Curve:
        """Medians over the seeds of time and metric at each evaluation."""
        columns = ("time", self.metric.column)
        times, values = (np.median([getattr(run.test, k) for run in runs], axis=0) for k in columns)
        return Curve(times, self.metric.scale * values, *line_style)
