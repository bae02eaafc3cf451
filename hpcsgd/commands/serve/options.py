"""Options of `hpcsgd serve`."""

# ruff: noqa: RUF009 - `option` returns a field

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Literal

from hpcsgd.commands.options import Label, Options, Value
from hpcsgd.commands.train.settings import option
from hpcsgd.registry.limits import Count, ElasticAlpha, Natural, Seconds, ServerMode, Timeout


@dataclass(frozen=True)
class ServeOptions(Options):
    """Run parameter servers for groups of workers in other jobs.

    Servers (each rank holds a part of the model): mpiexec -n 1 hpcsgd serve --listen FILE. A group: mpiexec
    -n 4 hpcsgd train --strategy ps:mode=MODE --connect FILE. Groups may connect, disconnect, die and return
    at any time; the servers exit when all groups have finished. After a stop or a crash the same command
    continues from the saved state, and the groups reconnect.
    """

    listen: Path = option(MISSING, "File to write the servers' addresses to, for --connect.", metavar="FILE")
    mode: ServerMode = option(
        "sync",
        "sync: a step with the mean gradient of all groups; async: a step with the gradient of each group; "
        "elastic: elastic averaging of models.",
    )
    alpha: ElasticAlpha | None = option(
        None,
        "Mode elastic: fraction of their distance by which a group's model and the servers' move towards "
        "each other; default: 0.9 / groups.",
    )
    max_staleness: Natural | None = option(
        None,
        "Largest number of pushes that a group may be ahead of the slowest; 0: all groups push together; "
        "default: unlimited.",
    )
    lease: Timeout = option(10.0, "Seconds without a message after which a group is no longer awaited.")
    checkpoint: Path | None = option(
        None,
        "Folder of the servers' checkpoint and update log; default: FILE.checkpoint.",
        metavar="FOLDER",
    )
    checkpoint_every: Timeout = option(60.0, "Seconds between checkpoints.")
    groups: Count = option(
        1, "Number of groups that must have connected and finished before the servers exit."
    )
    linger: Seconds = option(60.0, "Seconds to wait for disconnected groups before exiting.")
    bind: Annotated[tuple[str, ...], Value(Label)] = option(
        (),
        "Address, network (10.1.0.0/16) or interface (ib0) at which to listen, can be repeated; default: "
        "all addresses of the host.",
        metavar="ADDRESS",
        multiple=True,
    )
    tls: bool | None = option(None, "Encrypt all links, or none; default: those that leave the host.")
    progress: Literal["auto", "live", "plain", "off"] = option(
        "auto", "Output: a live table, plain lines, or none; auto: live on a terminal."
    )
