"""`hpcsgd topology` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from hpcsgd.commands.bench.commands import parse_count
from hpcsgd.errors import HpcsgdError


@click.command()
@click.argument("name", required=False)
@click.option("-n", "--peers", default=16, show_default=True, type=click.IntRange(1), help="Number of peers.")
@click.option(
    "--parameters",
    default="1M",
    show_default=True,
    metavar="N",
    help="Number of float32 parameters of the model, such as 11.2M.",
)
@click.option(
    "--png",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw the topology into this file, FILE.png.",
)
def topology(name: str | None, peers: int, parameters: str, png: Path | None) -> None:
    """Compare the mixing rate and the traffic of topologies.

    Shows topology NAME, or all topologies without NAME. NAME takes options, joined by "+":
    random-regular:degree=4+seed=1.
    """
    from rich.console import Console

    from hpcsgd.commands.topology import tables
    from hpcsgd.topology import build

    if png is not None and (name is None or png.suffix != ".png"):
        raise click.UsageError("--png draws one topology: give its NAME, and a FILE that ends in .png")
    count = parse_count(parameters, "--parameters")
    if count < 1:
        raise click.BadParameter("expected at least 1", param_hint="--parameters")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if name is None:
        console.print(tables.comparison(peers, count))
        return
    built = build(name, peers)
    console.print(tables.details(built, name, count))
    if png is not None:
        from hpcsgd.commands.report import figures
        from hpcsgd.commands.topology.drawing import draw

        with figures.style():
            figure = draw(built, f"{name}, {peers} peers")
        figure.set_label(png.stem)
        try:
            click.echo(figures.png(figure, png.parent))
        except OSError as error:
            raise HpcsgdError(
                f"cannot write {png}", got=error, do="give --png a file that can be written"
            ) from error
