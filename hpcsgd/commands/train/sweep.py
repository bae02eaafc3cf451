"""Sweeps: TOML files of settings with a table ``[[run]]`` for each of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from hpcsgd.errors import BadOption
from hpcsgd.registry import Within

_RUNS = "run"
#: Number of a run.
Element = Annotated[int, Within(0, 10**6)]


def count_runs(table: dict[str, Any], path: str | Path) -> int:
    """Return the number of runs in a file's contents; 0: the file is no sweep.

    Raises
    ------
    BadOption
        The key of the runs has another type.
    """
    runs = table.get(_RUNS, [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise BadOption(f"{path}: {_RUNS!r} is not a list of tables", do=f"begin each run with [[{_RUNS}]]")
    return len(runs)


def select_run(table: dict[str, Any], path: str | Path, element: int | None) -> dict[str, Any]:
    """Return the settings of one run: those of its own table, on top of those before the first table.

    `element` is its number, from 0; None: the file is no sweep, and its contents are the settings.

    Raises
    ------
    BadOption
        The file is a sweep and no element is given, or it has no such element.
    """
    runs = count_runs(table, path)
    if not runs and element is None:
        return table
    if element is None or not 0 <= element < runs:
        raise BadOption(
            f"{path} is a sweep of {runs} runs" if runs else f"{path} is not a sweep",
            expected=f"--element 0 to {runs - 1}" if runs else f"tables [[{_RUNS}]] in the file",
            got="no --element" if element is None else f"--element {element}",
        )
    common = {name: value for name, value in table.items() if name != _RUNS}
    return {**common, **table[_RUNS][element]}
