"""MPI-native, communication-efficient distributed SGD for PyTorch.

Importing this does not initialise MPI; a `Run` or a `World` does. Nor does it import torch before one
of the names below is used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcsgd.compress import (
        BF16,
        FP16,
        ErrorFeedback,
        GlobalRandK,
        GlobalRandKMaxNorm,
        GlobalRandKMaxNormMultiScale,
        Hadamard,
        PowerSGD,
        QSGDMaxNorm,
        QSGDMaxNormMultiScale,
        SignSGD,
        TopK,
    )
    from hpcsgd.errors import BadOption, DeadlineExceeded, Disagreement, HpcsgdError
    from hpcsgd.mpi.world import World
    from hpcsgd.strategies import (
        ADPSGD,
        DSGD,
        LASGD,
        SGP,
        AllReduce,
        BackupWorkers,
        LocalSGD,
        ParameterServer,
        Strategy,
        Teleportation,
    )
    from hpcsgd.tensors.group import TensorGroup
    from hpcsgd.training.run import Run

__all__ = [
    "ADPSGD",
    "BF16",
    "DSGD",
    "FP16",
    "LASGD",
    "SGP",
    "AllReduce",
    "BackupWorkers",
    "BadOption",
    "DeadlineExceeded",
    "Disagreement",
    "ErrorFeedback",
    "GlobalRandK",
    "GlobalRandKMaxNorm",
    "GlobalRandKMaxNormMultiScale",
    "Hadamard",
    "HpcsgdError",
    "LocalSGD",
    "ParameterServer",
    "PowerSGD",
    "QSGDMaxNorm",
    "QSGDMaxNormMultiScale",
    "Run",
    "SignSGD",
    "Strategy",
    "Teleportation",
    "TensorGroup",
    "TopK",
    "World",
]

_HOMES: dict[str, tuple[str, ...]] = {
    "compress": (
        "BF16",
        "ErrorFeedback",
        "FP16",
        "GlobalRandK",
        "GlobalRandKMaxNorm",
        "GlobalRandKMaxNormMultiScale",
        "Hadamard",
        "PowerSGD",
        "QSGDMaxNorm",
        "QSGDMaxNormMultiScale",
        "SignSGD",
        "TopK",
    ),
    "errors": ("BadOption", "DeadlineExceeded", "Disagreement", "HpcsgdError"),
    "training.run": ("Run",),
    "strategies": (
        "ADPSGD",
        "AllReduce",
        "BackupWorkers",
        "DSGD",
        "LASGD",
        "LocalSGD",
        "ParameterServer",
        "SGP",
        "Strategy",
        "Teleportation",
    ),
    "tensors.tensors": ("TensorGroup",),
    "mpi.world": ("World",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f"hpcsgd.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'hpcsgd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
