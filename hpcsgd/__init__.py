"""MPI-native, communication-efficient distributed SGD for PyTorch.

Importing this does not initialise MPI; a `Run` or a `World` does. Nor does it import torch before one
of the names below is used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from hpcsgd.compress import COMPRESSORS, WRAPPERS
from hpcsgd.strategies import STRATEGIES

if TYPE_CHECKING:  # for type checkers; a test compares these imports with the table below
    from hpcsgd.compress.error_feedback import ErrorFeedback as ErrorFeedback
    from hpcsgd.compress.hadamard import Hadamard as Hadamard
    from hpcsgd.compress.half import BF16 as BF16
    from hpcsgd.compress.half import FP16 as FP16
    from hpcsgd.compress.maxnorm import QSGDMaxNorm as QSGDMaxNorm
    from hpcsgd.compress.multiscale import QSGDMaxNormMultiScale as QSGDMaxNormMultiScale
    from hpcsgd.compress.powersgd import PowerSGD as PowerSGD
    from hpcsgd.compress.randk import GlobalRandK as GlobalRandK
    from hpcsgd.compress.randk import GlobalRandKMaxNorm as GlobalRandKMaxNorm
    from hpcsgd.compress.randk import GlobalRandKMaxNormMultiScale as GlobalRandKMaxNormMultiScale
    from hpcsgd.compress.signsgd import SignSGD as SignSGD
    from hpcsgd.compress.topk import TopK as TopK
    from hpcsgd.errors import BadOption as BadOption
    from hpcsgd.errors import DeadlineExceeded as DeadlineExceeded
    from hpcsgd.errors import Disagreement as Disagreement
    from hpcsgd.errors import HpcsgdError as HpcsgdError
    from hpcsgd.mpi.world import World as World
    from hpcsgd.strategies.adpsgd.strategy import ADPSGD as ADPSGD
    from hpcsgd.strategies.allreduce import AllReduce as AllReduce
    from hpcsgd.strategies.backup_workers.strategy import BackupWorkers as BackupWorkers
    from hpcsgd.strategies.base import Strategy as Strategy
    from hpcsgd.strategies.dsgd import DSGD as DSGD
    from hpcsgd.strategies.lasgd.strategy import LASGD as LASGD
    from hpcsgd.strategies.local_sgd import LocalSGD as LocalSGD
    from hpcsgd.strategies.parameter_server.strategy import ParameterServer as ParameterServer
    from hpcsgd.strategies.sgp import SGP as SGP
    from hpcsgd.strategies.teleportation.strategy import Teleportation as Teleportation
    from hpcsgd.tensors.group import TensorGroup as TensorGroup
    from hpcsgd.training.run import Run as Run

#: The module of each public name; strategies and compressors are those of their registries.
_MODULE_OF = {
    "Run": "hpcsgd.training.run",
    "World": "hpcsgd.mpi.world",
    "TensorGroup": "hpcsgd.tensors.group",
    "Strategy": "hpcsgd.strategies.base",
    **STRATEGIES.modules,
    **COMPRESSORS.modules,
    **WRAPPERS.modules,
    **dict.fromkeys(("BadOption", "DeadlineExceeded", "Disagreement", "HpcsgdError"), "hpcsgd.errors"),
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'hpcsgd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
