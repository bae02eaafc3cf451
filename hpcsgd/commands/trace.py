"""`hpcsgd trace`: merges the timelines of a run's ranks into one file, and draws it."""

from __future__ import annotations

import re
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("folder", type=_PATH)
@click.option("--png", metavar="FILE", type=_PATH, help="Draw the timeline into this file, FILE.png.")
@click.option("--steps", metavar="FIRST:LAST", help="Steps to draw; default: all.")
def trace(folder: Path, png: Path | None, steps: str | None) -> None:
    """Merge and draw the timeline of a traced run.

    FOLDER is that of `hpcsgd train --trace`, or of any script with HPCSGD_TRACE=FOLDER in its environment.
    Prints the path of trace.json; open it in https://ui.perfetto.dev or chrome://tracing. If a rank was
    killed, trace.json is made now, from the records that each rank has written.
    """
    from hpcsgd.commands.report import figures
    from hpcsgd.commands.report.timeline import timeline
    from hpcsgd.diagnostics import trace_file

    found = re.fullmatch(r"(\d+):(\d+)", steps or "0:0")
    if found is None or (png is not None and png.suffix != ".png"):
        raise click.UsageError(
            "give --png a file name that ends in .png, and --steps two numbers: FIRST:LAST"
        )
    file = trace_file.merge(folder)
    click.echo(file)
    if png is not None:
        figure = timeline(file, *(map(int, found.groups()) if steps else ()))
        figure.set_label(png.stem)
        click.echo(figures.png(figure, png.parent))
