"""MPI-native, communication-efficient distributed SGD for PyTorch.

Importing this does not initialise MPI; a `Run` or a `World` does.
"""

from __future__ import annotations

from hpcsgd.errors import BadOption, DeadlineExceeded, Disagreement, HpcsgdError
from hpcsgd.run import Run
from hpcsgd.strategies import AllReduce, LocalSGD, Strategy
from hpcsgd.tensors import TensorGroup
from hpcsgd.world import World

__all__ = [
    "AllReduce",
    "BadOption",
    "DeadlineExceeded",
    "Disagreement",
    "HpcsgdError",
    "LocalSGD",
    "Run",
    "Strategy",
    "TensorGroup",
    "World",
]
