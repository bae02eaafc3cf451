"""Strategies: the methods of distributed SGD, one file or folder each."""

from __future__ import annotations

from hpcsgd import registry
from hpcsgd.errors import BadOption
from hpcsgd.strategies.adpsgd.strategy import ADPSGD
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.backup_workers.strategy import BackupWorkers
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.dsgd import DSGD
from hpcsgd.strategies.lasgd.strategy import LASGD
from hpcsgd.strategies.local_sgd import LocalSGD
from hpcsgd.strategies.parameter_server.strategy import ParameterServer
from hpcsgd.strategies.sgp import SGP
from hpcsgd.strategies.teleportation.strategy import Teleportation

__all__ = [
    "ADPSGD",
    "DSGD",
    "LASGD",
    "SGP",
    "STRATEGIES",
    "AllReduce",
    "BackupWorkers",
    "LocalSGD",
    "ParameterServer",
    "Strategy",
    "StrategyContext",
    "Teleportation",
    "build",
    "check_accepted",
]

#: The methods by the name that `--strategy` uses.
STRATEGIES: dict[str, type[Strategy]] = {
    "allreduce": AllReduce,
    "local": LocalSGD,
    "lasgd": LASGD,
    "dsgd": DSGD,
    "backup": BackupWorkers,
    "sgp": SGP,
    "adpsgd": ADPSGD,
    "teleport": Teleportation,
    "ps": ParameterServer,
}


def build(spec: str, **context: object) -> Strategy:
    """Make a strategy from ``NAME`` or ``NAME:key=value,key=value``.

    Parameters
    ----------
    spec
        A name of `STRATEGIES` and its options.
    context
        Options that the caller sets.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    return registry.build(STRATEGIES, spec, "strategy", **context)


def check_accepted(strategy: Strategy, context: StrategyContext) -> None:
    """Raise `BadOption`, on all ranks, if the run has an option that its method does not accept."""
    if context.peers.size == 1:
        return
    title = strategy.title or type(strategy).__name__
    if context.compress is not None and not strategy.accepts_compression:
        others = [name for name, each in STRATEGIES.items() if each.accepts_compression]
        raise BadOption(
            f"{title} sends whole models and cannot compress them",
            got=f"compress={context.compress}",
            do=f"use strategy {_either(others)}, or set compress to none",
            everywhere=True,
        )
    if context.peers.per_rank > 1 and not strategy.accepts_virtual_nodes:
        others = [name for name, each in STRATEGIES.items() if each.accepts_virtual_nodes]
        raise BadOption(
            f"{title} has no virtual nodes",
            got=f"{context.peers.size} nodes on {context.world.size} ranks",
            do=f"use strategy {_either(others)}, or do not set virtual_nodes",
            everywhere=True,
        )


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
