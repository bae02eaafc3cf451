"""The policies of `hpcsgd train --on-failure`, and the settings that they exclude."""

from __future__ import annotations

import sys
from typing import NoReturn

from hpcsgd import registry
from hpcsgd.commands.train.settings import Settings
from hpcsgd.errors import BadOption, RankFailed
from hpcsgd.mpi import shutdown, ulfm
from hpcsgd.mpi.world import World


def check_on_failure(settings: Settings, world: World) -> None:
    """Raise on all ranks if `--on-failure shrink` is set and this run cannot continue without a rank."""
    if settings.on_failure != "shrink":
        return
    if world.size > 1 and not ulfm.is_enabled():
        raise BadOption(
            "this MPI ends all ranks when one rank dies",
            got="--on-failure shrink",
            do="start with Open MPI 5: mpiexec --with-ft ulfm; with another MPI use --on-failure restart, "
            "and resume after a failure: --resume FOLDER",
            everywhere=True,
        )
    check_ranks_may_change(settings, "--on-failure shrink")


def check_ranks_may_change(settings: Settings, got: str) -> None:
    """Raise on all ranks, with `got`, if this run cannot continue on another number of ranks."""
    if settings.virtual_nodes is not None:
        raise BadOption(
            "a run with virtual nodes cannot continue on another number of ranks",
            got=f"{got}, --virtual-nodes {settings.virtual_nodes}",
            do="start as many ranks as before, and leave out --on-failure shrink",
            everywhere=True,
        )
    if registry.parse(settings.strategy)[0] == "ps":
        raise BadOption(
            "a run with servers among its ranks cannot continue on another number of ranks",
            got=f"{got}, --strategy {settings.strategy}",
            do="run servers and groups as jobs of their own, which survive each other: hpcsgd serve",
            everywhere=True,
        )


def exit_after_failure(lost: RankFailed, settings: Settings, folder: str, world: World) -> NoReturn:
    """End the surviving ranks; rank 0 prints the failure, and the option to resume with."""
    if world.rank == 0:
        others = ", with any number of ranks" if settings.on_failure == "restart" else ""
        print(f"hpcsgd: {lost}\n  then:     --resume {folder}{others}", file=sys.stderr, flush=True)
    shutdown.exit_process(1)
