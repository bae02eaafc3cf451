"""Results of a benchmark: columns of a table on the terminal and of a CSV file."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.fingerprint import package_version

R = TypeVar("R")
Row = dict[str, object]


@dataclass(frozen=True)
class Column(Generic[R]):
    """A quantity of each result. NaN and None are empty cells; infinity is "never" in a table."""

    value: Callable[[R], Any]  # returns the quantity of a result
    name: str = ""  # its name in the CSV file; empty: it is in the table only
    heading: str | None = None  # its heading in the table; None: it is in the CSV file only
    #: Its format in the table, or a function that formats it.
    form: str | Callable[[Any], str] = ""
    digits: int | None = 4  # decimals in the CSV file; None: it is rounded to a whole number

    def text(self, result: R) -> str:
        """Return the cell in the table."""
        value = self.value(result)
        if _is_missing(value):
            return ""
        return self.form(value) if callable(self.form) else or_never(value, self.form)

    def stored(self, result: R) -> object:
        """Return the cell in the CSV file."""
        value = self.value(result)
        if _is_missing(value) or value == math.inf:
            return ""
        return round(float(value), self.digits) if isinstance(value, float) else value


@dataclass(frozen=True)
class Results(Generic[R]):
    """Results of one kind, all with the same columns; the first column of the table is text."""

    columns: Sequence[Column[R]]
    results: Sequence[R]  # a row each
    #: Text above and below the table.
    title: str = ""
    notes: str = ""

    def show(self) -> None:
        """Print the table; a first cell that repeats the one above it is left empty."""
        table = Table(title=self.title, caption=self.notes, title_justify="left", caption_justify="left")
        shown = {c.heading: c for c in self.columns if c.heading is not None}
        for index, heading in enumerate(shown):
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        above = None
        for result in self.results:
            first, *others = (column.text(result) for column in shown.values())
            table.add_row("" if first == above else first, *others)
            above = first
        # Without a terminal, as in the log of a batch job, rich would fold the table into 80 columns.
        console = Console()
        Console(width=None if console.is_terminal else 160).print(table)

    def rows(self, environment: Row) -> list[Row]:
        """Return the rows of the CSV file; columns of these names take precedence over the environment."""
        stored = [column for column in self.columns if column.name]
        rows = [{column.name: column.stored(result) for column in stored} for result in self.results]
        return [row | {name: environment[name] for name in environment if name not in row} for row in rows]


class Timed:
    """A result with the seconds of its calls, (calls,)."""

    seconds: np.ndarray

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return float(np.median(self.seconds))


def times(seconds: Callable[[R], Any], form: str = ".3f") -> list[Column[R]]:
    """Return columns of the median, which is in the table too, the minimum and the maximum, in milliseconds.

    `seconds` returns the times of a result in seconds, (calls,); `form` is the format of the median.
    """
    statistics: dict[str, Callable[[Any], Any]] = {"median_ms": np.median, "min_ms": min, "max_ms": max}

    def milliseconds(statistic: Callable[[Any], Any]) -> Callable[[R], float]:
        return lambda result: 1e3 * float(statistic(seconds(result)))

    return [
        Column(milliseconds(function), name, "ms" if name == "median_ms" else None, form, 5)
        for name, function in statistics.items()
    ]


def or_never(value: Any, form: str) -> str:
    """Format a number as `form`, a format and optionally a unit after a space; "never" for infinity."""
    number, _, unit = form.partition(" ")
    return "never" if value == math.inf else f"{value:{number}} {unit}".strip()


def write_csv(path: Path | None, rows: Sequence[Row]) -> None:
    """Write the rows below a header of the first row's keys, if there is a path."""
    if path is None:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def check_writable(world: World, path: Path | None) -> None:
    """Raise `HpcsgdError` on all ranks if rank 0 cannot write `path`; called before the measurement."""
    problem = ""
    if path is not None and world.rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            problem = str(error)
    problem = world.gather(problem, "whether the results can be written")[0]
    if problem:
        raise HpcsgdError(
            f"cannot write the results: {problem}",
            rank=0,
            do="give --csv or --out a path that rank 0 can write",
            everywhere=True,
        )


def check(world: World, method: str, correct: bool, expected: str, got: object) -> None:
    """Raise `HpcsgdError` on all ranks if the result of a method is wrong on some; collective."""
    checks = world.gather((correct, got), f"the check of {method}")
    wrong = [rank for rank, (right, _) in enumerate(checks) if not right]
    if wrong:
        raise HpcsgdError(
            f"the result of {method} is wrong",
            rank=wrong,
            expected=expected,
            got=", ".join(str(each) for _, each in checks),
            do="report this as a bug of hpcsgd, with the output of `hpcsgd doctor`",
            everywhere=True,
        )


def environment(world: World) -> Row:
    """Ranks, machine and package versions, as columns of a CSV file."""
    from mpi4py import MPI

    library = MPI.Get_library_version().splitlines()[0]
    return {
        "ranks": world.size,
        "nodes": world.nodes,
        "host": world.host,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mpi": " ".join(library.replace("\x00", "").split()),
        **{name: package_version(name) for name in ("hpcsgd", "mpi4py", "torch", "numpy", "numba")},
    }


def describe_ranks(world: World) -> str:
    """The numbers of ranks and nodes, for a title."""
    return count_on_nodes(world.size, world.nodes)


def count_on_nodes(count: int, nodes: int, noun: str = "rank") -> str:
    """Numbers of ranks and nodes as text, such as "4 ranks on 2 nodes"."""
    return f"{count} {noun}{'s' if count > 1 else ''} on {'one node' if nodes == 1 else f'{nodes} nodes'}"


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
