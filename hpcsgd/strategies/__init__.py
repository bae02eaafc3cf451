"""The methods of distributed SGD, one file each."""

from __future__ import annotations

from collections.abc import Callable

from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.strategies.base import Setting, Strategy
from hpcsgd.strategies.dsgd import DSGD
from hpcsgd.strategies.local import LocalSGD

__all__ = ["DSGD", "STRATEGIES", "AllReduce", "LocalSGD", "Setting", "Strategy"]

#: What `--strategy` knows.
STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "allreduce": AllReduce,
    "local": LocalSGD,
    "dsgd": DSGD,
}
