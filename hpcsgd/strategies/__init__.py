"""Strategies: the methods of distributed SGD, one file or folder each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcsgd import registry
from hpcsgd.errors import BadOption

if TYPE_CHECKING:
    from hpcsgd.strategies.base import Strategy
    from hpcsgd.strategies.context import StrategyContext

#: The methods by the name that `--strategy` uses. Their classes are exported by `hpcsgd`.
STRATEGIES: registry.Rows[Strategy] = registry.Rows(
    "strategy",
    __name__,
    {
        "allreduce": "allreduce.AllReduce",
        "local": "local_sgd.LocalSGD",
        "lasgd": "lasgd.strategy.LASGD",
        "dsgd": "dsgd.DSGD",
        "backup": "backup_workers.strategy.BackupWorkers",
        "sgp": "sgp.SGP",
        "adpsgd": "adpsgd.strategy.ADPSGD",
        "teleport": "teleportation.strategy.Teleportation",
        "ps": "parameter_server.strategy.ParameterServer",
    },
)


def build(spec: str, **context: object) -> Strategy:
    """Make a strategy from ``NAME`` or ``NAME:key=value,key=value``, with further options from the caller.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    return registry.build(STRATEGIES, spec, "strategy", **context)


def attach(strategy: Strategy, context: StrategyContext) -> None:
    """Call `strategy.attach`, or raise `BadOption`, on all ranks, for an option that it does not accept."""
    if context.peers.size > 1:
        _check_accepted(strategy, context)
    strategy.attach(context)


def _check_accepted(strategy: Strategy, context: StrategyContext) -> None:
    title = strategy.title or type(strategy).__name__
    if context.compress is not None and not strategy.accepts_compression:
        others = _accepting("accepts_compression")
        raise BadOption(
            f"{title} sends whole models and cannot compress them",
            got=f"compress={context.compress}",
            do=f"use strategy {_either(others)}, or set compress to none",
            everywhere=True,
        )
    if context.peers.per_rank > 1 and not strategy.accepts_virtual_nodes:
        others = _accepting("accepts_virtual_nodes")
        raise BadOption(
            f"{title} has no virtual nodes",
            got=f"{context.peers.size} nodes on {context.world.size} ranks",
            do=f"use strategy {_either(others)}, or do not set virtual_nodes",
            everywhere=True,
        )


def _accepting(attribute: str) -> list[str]:
    return [name for name, each in STRATEGIES.items() if getattr(each, attribute)]


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
