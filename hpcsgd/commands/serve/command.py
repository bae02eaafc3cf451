"""`hpcsgd serve` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hpcsgd.commands import signals

_PATH = click.Path(path_type=Path)
_SECONDS = click.FloatRange(0, min_open=True)


@click.command()
@click.option(
    "--listen",
    required=True,
    metavar="FILE",
    type=_PATH,
    help="File to write the servers' addresses to, for --connect.",
)
@click.option(
    "--mode",
    default="sync",
    show_default=True,
    type=click.Choice(["sync", "async", "elastic"]),
    help="sync: a step with the mean gradient of all groups; async: a step with the gradient of each group; "
    "elastic: elastic averaging of models.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Mode elastic: fraction of their distance by which a group's model and the servers' move towards "
    "each other; default: 0.9 / groups.",
)
@click.option(
    "--max-staleness",
    type=click.IntRange(0),
    help="Largest number of pushes that a group may be ahead of the slowest; 0: all groups push together; "
    "default: unlimited.",
)
@click.option(
    "--lease",
    default=10.0,
    show_default=True,
    type=_SECONDS,
    help="Seconds without a message after which a group is no longer awaited.",
)
@click.option(
    "--checkpoint",
    metavar="FOLDER",
    type=_PATH,
    help="Folder of the servers' checkpoint and update log; default: FILE.checkpoint.",
)
@click.option(
    "--checkpoint-every", default=60.0, show_default=True, type=_SECONDS, help="Seconds between checkpoints."
)
@click.option(
    "--groups",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Number of groups that must have connected and finished before the servers exit.",
)
@click.option(
    "--linger",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Seconds to wait for disconnected groups before exiting.",
)
@click.option(
    "--bind",
    multiple=True,
    metavar="ADDRESS",
    help="Address, network (10.1.0.0/16) or interface (ib0) at which to listen, can be repeated; default: "
    "all addresses of the host.",
)
@click.option(
    "--tls/--no-tls",
    default=None,
    help="Encrypt all links, or none; default: those that leave the host.",
)
@click.option(
    "--progress",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "live", "plain", "off"]),
    help="Output: a live table, plain lines, or none; auto: live on a terminal.",
)
def serve(**options: Any) -> None:
    """Run parameter servers for groups of workers in other jobs.

    Servers (each rank holds a part of the model): mpiexec -n 1 hpcsgd serve --listen FILE. A group: mpiexec
    -n 4 hpcsgd train --strategy ps:mode=MODE --connect FILE. Groups may connect, disconnect, die and return
    at any time; the servers exit when all groups have finished. After a stop or a crash the same command
    continues from the saved state, and the groups reconnect.
    """
    signals.defer_sigusr1()
    from hpcsgd.commands.serve.job import serve as execute
    from hpcsgd.commands.serve.service import ServeOptions

    execute(ServeOptions(**options))
    signals.ignore_sigusr1()
