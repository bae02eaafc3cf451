"""What a benchmark leaves behind: a table on the terminal and a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World

Row = dict[str, object]


def check_writable(world: World, path: Path | None) -> None:
    """Raise on all ranks, before anything is measured, where rank 0 cannot write `path`."""
    problem = ""
    if path is not None and world.rank == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as error:
            problem = str(error)
    problem = world.gather(problem, "whether the results can be written")[0]
    if problem:
        raise HpcsgdError(f"cannot write the results: {problem}", rank=0, everywhere=True)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one line per row under a header of the first row's names."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, caption=notes, title_justify="left", caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Without a terminal, a batch job's log say, rich would fold the table into 80 columns.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def milliseconds(seconds: np.ndarray) -> Row:
    """Median, smallest and largest time."""
    times = {"median_ms": np.median(seconds), "min_ms": seconds.min(), "max_ms": seconds.max()}
    return {name: round(1e3 * float(value), 5) for name, value in times.items()}


def facts(world: World) -> Row:
    """The ranks, the machine and the versions, as columns of a CSV file."""
    from mpi4py import MPI

    library = MPI.Get_library_version().splitlines()[0]
    return {
        "ranks": world.size,
        "nodes": world.nodes,
        "host": world.host,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "mpi": " ".join(library.replace("\x00", "").split()),
        **{name: _version(name) for name in ("hpcsgd", "mpi4py", "torch", "numpy", "numba")},
    }


def layout(world: World) -> str:
    """The ranks in words, for a title."""
    return on_nodes(world.size, world.nodes)


def on_nodes(count: int, nodes: int, what: str = "rank") -> str:
    """So many ranks on so many nodes, in words."""
    return f"{count} {what}{'s' if count > 1 else ''} on {'one node' if nodes == 1 else f'{nodes} nodes'}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
