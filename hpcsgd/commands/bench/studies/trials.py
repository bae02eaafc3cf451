"""The runs of a study: measurements of one run, and statistics over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import FinishedRun
from hpcsgd.commands.report.records import EvaluationRecords, Floats
from hpcsgd.strategies import build

S = TypeVar("S")


@dataclass(frozen=True)
class Trial(Generic[S]):
    """One run of a study: its condition, seed, method and records; a subclass defines the target."""

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
    def seconds(self) -> float:
        """Mean seconds per iteration, without evaluation."""
        return float(self.test.time[-1] / self.test.step[-1])

    @property
    def accuracy(self) -> float:
        return float(self.test.accuracy[-1])

    def reached(self, target: float) -> tuple[float, float]:
        """Iterations and seconds to the target; infinite if it was not reached."""
        raise NotImplementedError

    def row(self, target: float) -> output.Row:
        """The columns of a CSV file that all studies have."""
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
            "fewest_gradients": min(self.gradients),
            "most_gradients": max(self.gradients),
        }


@dataclass(frozen=True)
class Medians:
    """Medians over the seeds; `gradients`: of the workers with the fewest and the most."""

    seconds: float
    accuracy: float
    iterations_to_target: float
    seconds_to_target: float
    gradients: tuple[float, float]


def goal_line(condition: object, goal: str, measured: str, met: bool) -> str:
    """A line with a goal, the measured value, and whether the goal is met."""
    return f"Goal, {condition}: {goal}. Measured: {measured}: {'met' if met else 'not met'}."


def or_never(value: float, form: str) -> str:
    """Format a number as `form`, a format and optionally a unit after a space; "never" for infinity."""
    number, _, unit = form.partition(" ")
    return "never" if np.isinf(value) else f"{value:{number}} {unit}".strip()


def mean_and_deviation(values: Sequence[float] | Floats, form: str) -> str:
    """Mean ± standard deviation as text; the mean alone for a single value."""
    mean = format(np.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {deviation(values):{form}}"


def deviation(values: Sequence[float] | Floats) -> float:
    """The sample standard deviation; 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def median(values: Sequence[float]) -> float:
    """The median as a Python float."""
    return float(np.median(values))
