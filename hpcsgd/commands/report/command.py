"""`hpcsgd report` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option(
    "--out", default="report", show_default=True, type=_PATH, help="Folder of the page and the figures."
)
@click.option(
    "--over",
    metavar="SETTING",
    help="Print only a table, with one row for runs that differ in this setting alone (such as seed).",
)
def report(runs: tuple[Path, ...], out: Path, over: str | None) -> None:
    """Compare runs in a table, figures and an HTML page.

    RUNS are folders of `hpcsgd train`. The table is printed; figures and page are written to a folder.
    """
    from rich.console import Console

    from hpcsgd.commands.report.grouped_table import grouped
    from hpcsgd.commands.report.run_reader import load
    from hpcsgd.commands.report.writer import table, write

    console = Console(width=None if sys.stdout.isatty() else 160)
    if over is not None:
        console.print(grouped([load(run) for run in runs], over))
        return
    console.print(table([load(run) for run in runs]))
    for path in write(runs, out):
        click.echo(path)
