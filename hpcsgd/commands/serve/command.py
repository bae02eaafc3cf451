"""`hpcsgd serve` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from hpcsgd.commands import signals
from hpcsgd.commands.options import Label, option
from hpcsgd.registry.limits import Count, ElasticAlpha, Natural, Seconds, ServerMode, Timeout


@click.command()
@option(
    "--listen", Path, "File to write the servers' addresses to, for --connect.", metavar="FILE", required=True
)
@option(
    "--mode",
    ServerMode,
    "sync: a step with the mean gradient of all groups; async: a step with the gradient of each group; "
    "elastic: elastic averaging of models.",
    "sync",
)
@option(
    "--alpha",
    ElasticAlpha,
    "Mode elastic: fraction of their distance by which a group's model and the servers' move towards "
    "each other; default: 0.9 / groups.",
)
@option(
    "--max-staleness",
    Natural,
    "Largest number of pushes that a group may be ahead of the slowest; 0: all groups push together; "
    "default: unlimited.",
)
@option("--lease", Timeout, "Seconds without a message after which a group is no longer awaited.", 10.0)
@option(
    "--checkpoint",
    Path,
    "Folder of the servers' checkpoint and update log; default: FILE.checkpoint.",
    metavar="FOLDER",
)
@option("--checkpoint-every", Timeout, "Seconds between checkpoints.", 60.0)
@option(
    "--groups", Count, "Number of groups that must have connected and finished before the servers exit.", 1
)
@option("--linger", Seconds, "Seconds to wait for disconnected groups before exiting.", 60.0)
@option(
    "--bind",
    Label,
    "Address, network (10.1.0.0/16) or interface (ib0) at which to listen, can be repeated; default: "
    "all addresses of the host.",
    metavar="ADDRESS",
    multiple=True,
)
@click.option(
    "--tls/--no-tls",
    default=None,
    help="Encrypt all links, or none; default: those that leave the host.",
)
@option(
    "--progress",
    Literal["auto", "live", "plain", "off"],
    "Output: a live table, plain lines, or none; auto: live on a terminal.",
    "auto",
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
    signals.ignore_stops()
