"""The result of a trial: faults by kind and method, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

_HEADINGS = ("fault", "method", "number", "recovered", "median s", "longest s")


@dataclass
class Case:
    """A fault, and its end.

    Attributes
    ----------
    kind, method
        The kind of the fault, and the method of the job.
    seconds
        Seconds from the end of the fault to the next record of each part of the job; None: never.
    """

    kind: str
    method: str
    seconds: float | None = None


@dataclass
class Result:
    """All of a trial.

    Attributes
    ----------
    seed, seconds
        Its seed and its length.
    cases
        The faults.
    failures
        What did not hold, with what is needed to repeat it.
    runs
        Number of runs that reached their end, by method.
    errors
        Exceptions that ended ranks, by type.
    """

    seed: int
    seconds: float = 0.0
    cases: list[Case] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    runs: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def rows(self) -> list[tuple[str, str, int, int, float, float]]:
        """Rows of kind, method, number, recovered, median and longest time; sums first."""
        groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
        for case in self.cases:
            for key in ((case.kind, case.method), (case.kind, "all"), ("all", case.method), ("all", "all")):
                groups[key].append(case)
        order = sorted(groups, key=lambda key: (key[0] != "all", key[0], key[1] != "all", key[1]))
        return [(*key, *_summary(groups[key])) for key in order]

    def json(self) -> str:
        """Return everything as JSON."""
        values: dict[str, Any] = {"seed": self.seed, "seconds": round(self.seconds, 1)}
        values["faults"] = [dict(zip(_HEADINGS, row, strict=True)) for row in self.rows()]
        values |= {"runs": self.runs, "errors": self.errors, "failures": self.failures}
        return json.dumps(values, indent=2)

    def __str__(self) -> str:
        lines = [_HEADINGS, *([*row[:4], f"{row[4]:.1f}", f"{row[5]:.1f}"] for row in self.rows())]
        table = "\n".join(_line(line) for line in lines)
        ended = ", ".join(f"{number} {method}" for method, number in sorted(self.runs.items()))
        errors = ", ".join(f"{number} {name}" for name, number in sorted(self.errors.items()))
        return (
            f"seed {self.seed}: {len(self.cases)} faults in {self.seconds:.0f} s, "
            f"{len(self.failures)} failures\n{table}\n"
            f"runs that reached their end: {ended or 'none'}\nexceptions that ended ranks: {errors or 'none'}"
        )


def _summary(cases: Sequence[Case]) -> tuple[int, int, float, float]:
    times = [case.seconds for case in cases if case.seconds is not None]
    return len(cases), len(times), round(median(times or [0.0]), 2), round(max(times, default=0.0), 2)


def _line(cells: Sequence[object]) -> str:
    first, second, *numbers = map(str, cells)
    return f"{first:<8} {second:<37} " + " ".join(f"{number:>10}" for number in numbers)
