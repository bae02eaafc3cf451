"""Methods compared in several settings: a table and a panel for each, medians over the seeds, and goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.trials import Numbers, Trial, median, or_never
from hpcsgd.commands.report.curves import Curve, draw_curves
from hpcsgd.commands.report.figures import (
    DASHES,
    PALETTE,
    Chart,
    Dashes,
    Panel,
    Place,
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
class Measure:
    """A column of the evaluations, and how its values are written."""

    column: str
    label: str
    form: str
    scale: float = 1.0


class Comparison(Generic[S, T]):
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
    notes
        Under the last table.
    """

    name: str
    measure: Measure
    columns: int
    notes: str

    def __init__(self, trials: Sequence[T]) -> None:
        self.trials = trials
        self.settings: list[S] = list(dict.fromkeys(trial.setting for trial in trials))
        self.methods = list(dict.fromkeys(trial.method for trial in trials))
        self._looks = [(PALETTE[i % len(PALETTE)], DASHES[i % len(DASHES)]) for i in range(len(self.methods))]

    def target(self, setting: S) -> float:
        """Of the measure."""
        raise NotImplementedError

    def title(self, setting: S) -> str:
        """Of its table."""
        raise NotImplementedError

    def relative(self, setting: S, found: Numbers) -> Cells:
        """Cells beside what an iteration takes."""
        return {}

    def quality(self, setting: S, method: str) -> Cells:
        """Cells beside when the target is reached."""
        raise NotImplementedError

    def goals(self) -> list[str]:
        """What was set out, and what was measured."""
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
        gradients = [trial.gradients for trial in trials]
        return Numbers(
            median([trial.seconds for trial in trials]),
            median([trial.accuracy for trial in trials]),
            median([iterations for iterations, _ in reached]),
            median([seconds for _, seconds in reached]),
            (median([min(g) for g in gradients]), median([max(g) for g in gradients])),
        )

    def show(self) -> None:
        """Print a table for each setting, and what became of the goals."""
        for setting in self.settings:
            rows = {
                method: self._cells(setting, method) for method in self.methods if self.of(setting, method)
            }
            header = ["", *next(iter(rows.values()))]
            lines = [[method, *cells.values()] for method, cells in rows.items()]
            notes = self.notes if setting == self.settings[-1] else ""
            output.show(self.title(setting), header, lines, notes)
        for told in self.goals():
            print(told, flush=True)

    def _cells(self, setting: S, method: str) -> Cells:
        found = self.numbers(setting, method)
        return {
            "ms per\niteration": f"{1e3 * found.seconds:.1f}",
            **self.relative(setting, found),
            "iterations\nto target": or_never(found.iterations_to_target, ".0f"),
            "seconds\nto target": or_never(found.seconds_to_target, ".2f"),
            **self.quality(setting, method),
            "gradients\nper worker": "..".join(f"{number:.0f}" for number in dict.fromkeys(found.gradients)),
        }

    def publish(self, out: Path, facts: output.Row) -> None:
        """Show the study; write its CSV file and its figure."""
        self.show()
        csv = out / f"{self.name}.csv"
        output.write_csv(csv, self.rows(facts))
        print(csv, png(self.figure(), out), sep="\n", flush=True)

    def figure(self) -> Figure:
        """The measure against time."""
        with style():
            from matplotlib.lines import Line2D

            handles = [Line2D([], [], color=color, linestyle=dashes) for color, dashes in self._looks]
            legend = list(zip(handles, self.methods, strict=True))
            return draw(Chart(self.name, "", self.panels(), legend), self.columns)

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
