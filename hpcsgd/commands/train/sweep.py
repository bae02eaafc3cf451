"""Sweeps: a TOML file of settings that has a table ``[[run]]`` for each of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcsgd.errors import BadOption

_RUNS = "run"


def count(table: dict[str, Any], path: str | Path) -> int:
    """How many runs a file's table has.

    Raises
    ------
    BadOption
        Something else is called like the list of runs.
    """
    runs = table.get(_RUNS, [])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise BadOption(f"{path}: {_RUNS!r} is no list of tables", do=f"write [[{_RUNS}]] before each")
    return len(runs)


def choose(table: dict[str, Any], path: str | Path, element: int | None) -> dict[str, Any]:
    """Settings of one run: its own table's, on top of what the file says before the first.

    Parameters
    ----------
    table
        What the file holds; without runs it is the settings.
    path
        Of the file, for messages.
    element
        Number of the run, from 0; None: the file is no sweep.

    Raises
    ------
    BadOption
        It is a sweep and no element is chosen, or has no such element.
    """
    runs = count(table, path)
    if not runs and element is None:
        return table
    if element is None or not 0 <= element < runs:
        raise BadOption(
            f"{path}: which run of the sweep?",
            expected=f"--element 0 to {runs - 1}" if runs else f"tables [[{_RUNS}]] in the file",
            got="none" if element is None else f"--element {element}",
        )
    common = {name: value for name, value in table.items() if name != _RUNS}
    return {**common, **table[_RUNS][element]}
