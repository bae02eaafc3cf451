"""Comparison of methods under several conditions: runs, tables, a CSV file, and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.output import Column, Results
from hpcsgd.commands.bench.studies.runner import FinishedRun
from hpcsgd.commands.report.figures import Chart, Panel, draw, line_styles, png, style
from hpcsgd.commands.report.records import EvaluationRecords
from hpcsgd.commands.report.words import in_words
from hpcsgd.strategies import build

if TYPE_CHECKING:
    from matplotlib.figure import Figure

S = TypeVar("S")


@dataclass(frozen=True)
class Trial(Generic[S]):
    """One run of a study: its condition, seed, method and records."""

    condition: S
    seed: int
    method: str
    finished: FinishedRun

    @property
    def test(self) -> EvaluationRecords:
        return self.finished.record.test

    @property
    def workers(self) -> int:
        """Number of ranks that compute gradients: the first ones."""
        ranks = len(self.finished.gradients)
        return build(self.method).workers(ranks)

    @property
    def gradients(self) -> list[int]:
        """Number of gradients that each worker has computed."""
        return self.finished.gradients[: self.workers]

    @property
    def iterations(self) -> int:
        return int(self.test.step[-1])

    @property
    def seconds(self) -> float:
        """Mean seconds per iteration, without evaluation."""
        return float(self.test.time[-1] / self.test.step[-1])

    @property
    def accuracy(self) -> float:
        return float(self.test.accuracy[-1])


T = TypeVar("T", bound=Trial[Any])


class Comparison(Generic[S, T]):
    """All runs of a study, one per condition, method and seed; a subclass defines what is shown."""

    name: str  # of the study's files
    panels_in_row: int

    def __init__(self, trials: Sequence[T]) -> None:
        self.trials = trials
        self.conditions: list[S] = list(dict.fromkeys(trial.condition for trial in trials))
        self.methods = list(dict.fromkeys(trial.method for trial in trials))
        #: Arguments of matplotlib for the line of each method, all-reduce first.
        self.line_styles: dict[str, dict[str, Any]] = {
            method: {"color": color, "linestyle": dashes}
            for method, (color, dashes) in line_styles(self.methods, {"allreduce"}).items()
        }

    def tables(self) -> Iterator[Results[Any]]:
        """The tables."""
        raise NotImplementedError

    def columns(self) -> list[Column[T]]:
        """Columns of the CSV file, which has a row per run."""
        raise NotImplementedError

    def panels(self) -> list[Panel]:
        """The panels of the figure."""
        raise NotImplementedError

    def trials_of(self, condition: S, method: str) -> list[T]:
        """The runs of a method under a condition."""
        return [trial for trial in self.trials if (trial.condition, trial.method) == (condition, method)]

    def publish(self, out: Path, environment: output.Row) -> None:
        """Print the tables; write the CSV file and the figure into `out`."""
        for table in self.tables():
            table.show()
        csv = out / f"{self.name}.csv"
        output.write_csv(csv, Results(self.columns(), self.trials).rows(environment))
        print(csv, png(self.figure(), out), sep="\n", flush=True)

    def figure(self) -> Figure:
        """The panels, with a legend of the methods."""
        with style():
            from matplotlib.lines import Line2D

            legend = [(Line2D([], [], **line), in_words(method)) for method, line in self.line_styles.items()]
            return draw(Chart(self.name, "", self.panels(), legend), self.panels_in_row)


def mean_and_deviation(values: Sequence[float], form: str = ".1f") -> str:
    """Mean ± standard deviation as text; the mean alone for a single value."""
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):{form}}"


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
