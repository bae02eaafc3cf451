"""The runs of a study, what is asked of each, and how numbers of several are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import Finished
from hpcsgd.commands.report.records import Evaluation, Floats
from hpcsgd.strategies import STRATEGIES

S = TypeVar("S")


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
    def workers(self) -> int:
        """How many ranks compute gradients: the first ones."""
        ranks = len(self.finished.gradients)
        return registry.build(STRATEGIES, self.method, "strategy").workers(ranks)

    @property
    def gradients(self) -> list[int]:
        """How many each worker has computed."""
        return self.finished.gradients[: self.workers]

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
            "fewest_gradients": min(self.gradients),
            "most_gradients": max(self.gradients),
        }


@dataclass(frozen=True)
class Numbers:
    """Of a method in a setting, medians over the seeds."""

    seconds: float
    accuracy: float
    iterations_to_target: float
    seconds_to_target: float
    gradients: tuple[float, float]


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


def median(values: Sequence[float]) -> float:
    """An even number of values may have one that is none of them."""
    return float(np.median(values))
