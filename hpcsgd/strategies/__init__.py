"""Strategies: the methods of distributed SGD, one file or folder each."""

from __future__ import annotations

from collections.abc import Callable

from hpcsgd import registry
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
]

#: The methods by the name that `--strategy` uses.
STRATEGIES: dict[str, Callable[..., Strategy]] = {
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
