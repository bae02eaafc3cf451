"""What `hpcsgd train --on-failure` promises, and when it cannot keep it."""

from __future__ import annotations

import sys
from typing import NoReturn

from hpcsgd import registry
from hpcsgd.commands.train.settings import Settings
from hpcsgd.errors import BadOption, RankFailed
from hpcsgd.mpi import shutdown, ulfm
from hpcsgd.mpi.world import World


def check_survival(settings: Settings, world: World) -> None:
    """Raise on all ranks where this run could not go on without a rank."""
    if settings.on_failure != "shrink":
        return
    if world.size > 1 and not ulfm.survivable():
        raise BadOption(
            "this MPI ends all ranks when one dies",
            got="--on-failure shrink",
            do="start with Open MPI 5: mpiexec --with-ft ulfm; with another MPI use --on-failure restart, "
            "and start again with --resume",
            everywhere=True,
        )
    _check_ranks_may_change(settings, "--on-failure shrink")


def check_movable(settings: Settings, ranks: int, world: World) -> None:
    """Raise on all ranks where a checkpoint of other ranks cannot be taken up."""
    _check_ranks_may_change(settings, f"a checkpoint of {ranks} ranks, and {world.size} ranks now")


def _check_ranks_may_change(settings: Settings, got: str) -> None:
    if settings.virtual_nodes is not None:
        raise BadOption(
            "virtual nodes cannot be shared out anew while they train",
            got=f"{got}, --virtual-nodes {settings.virtual_nodes}",
            do="start as many ranks as before, without --on-failure shrink",
            everywhere=True,
        )
    if registry.parse(settings.strategy)[0] == "ps":
        raise BadOption(
            "servers among the ranks cannot be replaced while they serve",
            got=f"{got}, --strategy {settings.strategy}",
            do="make servers and groups jobs of their own, which survive each other: hpcsgd serve",
            everywhere=True,
        )


def leave(lost: RankFailed, settings: Settings, folder: str, world: World) -> NoReturn:
    """End the ranks that are left, of which one says why."""
    if world.rank == 0:
        others = ", by any number of ranks" if settings.on_failure == "restart" else ""
        print(f"hpcsgd: {lost}\n  then:     --resume {folder}{others}", file=sys.stderr, flush=True)
    shutdown.leave(1)
