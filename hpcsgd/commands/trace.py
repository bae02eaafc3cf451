"""`hpcsgd trace`: merges the timelines of a run's ranks into one file, and draws it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import click

from hpcsgd.commands.options import Value, option
from hpcsgd.registry import Accepted


def _steps(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(text)
    return int(found[1]), int(found[2])


@click.command()
@click.argument("folder", type=Value(Path), metavar="FOLDER")
@option("--png", Path, "Draw the timeline into this file, FILE.png.", metavar="FILE")
@option(
    "--steps",
    Annotated[str, Accepted(_steps, "0:20, the first and the last")],
    "Steps to draw; default: all.",
    metavar="FIRST:LAST",
)
def trace(folder: Path, png: Path | None, steps: str | None) -> None:
    """Merge and draw the timeline of a traced run.

    FOLDER is that of `hpcsgd train --trace`, or of any script with HPCSGD_TRACE=FOLDER in its environment.
    Prints the path of trace.json; open it in https://ui.perfetto.dev or chrome://tracing. If a rank was
    killed, trace.json is made now, from the records that each rank has written.
    """
    from hpcsgd.commands.report import figures
    from hpcsgd.commands.report.timeline import timeline
    from hpcsgd.diagnostics import trace_file

    if png is not None and png.suffix != ".png":
        raise click.UsageError("give --png a file name that ends in .png")
    file = trace_file.merge(folder)
    click.echo(file)
    if png is not None:
        figure = timeline(file, *(_steps(steps) if steps else ()))
        figure.set_label(png.stem)
        click.echo(figures.png(figure, png.parent))
