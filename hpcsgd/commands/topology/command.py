"""`hpcsgd topology` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import click

from hpcsgd.commands.options import ShortCount, TopologySpec, Value, option
from hpcsgd.errors import os_errors
from hpcsgd.registry import Within


@click.command()
@click.argument("name", required=False, type=Value(TopologySpec), metavar="[NAME]")
@option("--peers", Annotated[int, Within(1, 4096)], "Number of peers.", 16, short="-n")
@option(
    "--parameters",
    ShortCount(Annotated[int, Within(1, 10**12)]),
    "Number of float32 parameters of the model, such as 11.2M.",
    "1M",
    metavar="N",
)
@option("--png", Path, "Draw the topology into this file, FILE.png.", metavar="FILE")
def topology(name: str | None, peers: int, parameters: int, png: Path | None) -> None:
    """Compare the mixing rate and the traffic of topologies.

    Shows topology NAME, or all topologies without NAME. NAME takes options, joined by "+":
    random-regular:degree=4+seed=1.
    """
    from rich.console import Console

    from hpcsgd.commands.topology import tables
    from hpcsgd.topology import build

    if png is not None and (name is None or png.suffix != ".png"):
        raise click.UsageError("--png draws one topology: give its NAME, and a FILE that ends in .png")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if name is None:
        console.print(tables.comparison(peers, parameters))
        return
    built = build(name, peers)
    console.print(tables.details(built, name, parameters))
    if png is not None:
        from hpcsgd.commands.report import figures
        from hpcsgd.commands.topology.drawing import draw

        with figures.style():
            figure = draw(built, f"{name}, {peers} peers")
        figure.set_label(png.stem)
        with os_errors(f"cannot write {png}", do="give --png a file that can be written"):
            click.echo(figures.png(figure, png.parent))
