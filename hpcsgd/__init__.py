"""MPI-native, communication-efficient distributed SGD for PyTorch.

Importing this does not initialise MPI; a `Run` or a `World` does. Nor does it import torch before one
of the names below is used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers; a test compares these imports with the table below
    from hpcsgd.compress import BF16 as BF16
    from hpcsgd.compress import FP16 as FP16
    from hpcsgd.compress import ErrorFeedback as ErrorFeedback
    from hpcsgd.compress import GlobalRandK as GlobalRandK
    from hpcsgd.compress import GlobalRandKMaxNorm as GlobalRandKMaxNorm
    from hpcsgd.compress import GlobalRandKMaxNormMultiScale as GlobalRandKMaxNormMultiScale
    from hpcsgd.compress import Hadamard as Hadamard
    from hpcsgd.compress import PowerSGD as PowerSGD
    from hpcsgd.compress import QSGDMaxNorm as QSGDMaxNorm
    from hpcsgd.compress import QSGDMaxNormMultiScale as QSGDMaxNormMultiScale
    from hpcsgd.compress import SignSGD as SignSGD
    from hpcsgd.compress import TopK as TopK
    from hpcsgd.errors import BadOption as BadOption
    from hpcsgd.errors import DeadlineExceeded as DeadlineExceeded
    from hpcsgd.errors import Disagreement as Disagreement
    from hpcsgd.errors import HpcsgdError as HpcsgdError
    from hpcsgd.mpi.world import World as World
    from hpcsgd.strategies import ADPSGD as ADPSGD
    from hpcsgd.strategies import DSGD as DSGD
    from hpcsgd.strategies import LASGD as LASGD
    from hpcsgd.strategies import SGP as SGP
    from hpcsgd.strategies import AllReduce as AllReduce
    from hpcsgd.strategies import BackupWorkers as BackupWorkers
    from hpcsgd.strategies import LocalSGD as LocalSGD
    from hpcsgd.strategies import ParameterServer as ParameterServer
    from hpcsgd.strategies import Strategy as Strategy
    from hpcsgd.strategies import Teleportation as Teleportation
    from hpcsgd.tensors.group import TensorGroup as TensorGroup
    from hpcsgd.training.run import Run as Run

#: The public names, by the module that defines them.
_NAMES = {
    "compress": "BF16 FP16 ErrorFeedback GlobalRandK GlobalRandKMaxNorm GlobalRandKMaxNormMultiScale "
    "Hadamard PowerSGD QSGDMaxNorm QSGDMaxNormMultiScale SignSGD TopK",
    "errors": "BadOption DeadlineExceeded Disagreement HpcsgdError",
    "mpi.world": "World",
    "strategies": "ADPSGD DSGD LASGD SGP AllReduce BackupWorkers LocalSGD ParameterServer Strategy "
    "Teleportation",
    "tensors.group": "TensorGroup",
    "training.run": "Run",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(import_module(f"hpcsgd.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'hpcsgd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
