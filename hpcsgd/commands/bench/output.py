"""Output of a benchmark: a table on the terminal and a CSV file."""

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


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows below a header of the first row's keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> None:
    """Print a table; the first column is text, the others are right-aligned numbers."""
    table = Table(title=title, caption=notes, title_justify="left", caption_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # Without a terminal, as in the log of a batch job, rich would fold the table into 80 columns.
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def milliseconds(seconds: np.ndarray) -> Row:
    """Median, minimum and maximum in milliseconds, as columns of a CSV file."""
    times = {"median_ms": np.median(seconds), "min_ms": seconds.min(), "max_ms": seconds.max()}
    return {name: round(1e3 * float(value), 5) for name, value in times.items()}


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
        **{name: _version(name) for name in ("hpcsgd", "mpi4py", "torch", "numpy", "numba")},
    }


def describe_ranks(world: World) -> str:
    """The numbers of ranks and nodes, for a title."""
    return count_on_nodes(world.size, world.nodes)


def count_on_nodes(count: int, nodes: int, noun: str = "rank") -> str:
    """Numbers of ranks and nodes as text, such as "4 ranks on 2 nodes"."""
    return f"{count} {noun}{'s' if count > 1 else ''} on {'one node' if nodes == 1 else f'{nodes} nodes'}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
