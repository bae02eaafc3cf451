"""The methods of distributed SGD, one file each."""

from __future__ import annotations

from collections.abc import Callable

from hpcsgd.strategies.adpsgd.adpsgd import ADPSGD
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.backup_workers.backup import BackupWorkers
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.dsgd import DSGD
from hpcsgd.strategies.lasgd.lasgd import LASGD
from hpcsgd.strategies.local import LocalSGD
from hpcsgd.strategies.parameter_server.ps import ParameterServer
from hpcsgd.strategies.push import SGP
from hpcsgd.strategies.teleportation.teleport import Teleportation

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
    "Setting",
    "Strategy",
    "Teleportation",
]

#: What `--strategy` knows.
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
