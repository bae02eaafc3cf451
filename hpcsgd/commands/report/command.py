"""`hpcsgd report` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hpcsgd.commands.options import Label, Value, option


@click.command()
@click.argument("runs", nargs=-1, required=True, type=Value(Path), metavar="RUNS...")
@option("--out", Path, "Folder of the page and the figures.", "report")
@option(
    "--over",
    Label,
    "Print only a table, with one row for runs that differ in this setting alone (such as seed).",
    metavar="SETTING",
)
def report(runs: tuple[Path, ...], out: Path, over: str | None) -> None:
    """Compare runs in a table, figures and an HTML page.

    RUNS are folders of `hpcsgd train`. The table is printed; figures and page are written to a folder.
    """
    from rich.console import Console

    from hpcsgd.commands.report.grouped_table import grouped
    from hpcsgd.commands.report.labels import labels
    from hpcsgd.commands.report.run_reader import load
    from hpcsgd.commands.report.writer import tables, write

    console = Console(width=None if sys.stdout and sys.stdout.isatty() else 160)
    if over is not None:
        console.print(grouped([load(run) for run in runs], over))
        return
    records = [load(run) for run in runs]
    console.print(*tables(records, console.width), sep="")
    for name, record in zip(labels(records), records, strict=True):
        for note in record.notes:
            click.echo(f"{name}: {note}")
    for path in write(runs, out):
        click.echo(path)
