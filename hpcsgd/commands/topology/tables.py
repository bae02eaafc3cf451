"""Tables of topologies: their traffic and mixing rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log

import numpy as np
from rich.console import Group
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from hpcsgd import registry
from hpcsgd.errors import HpcsgdError
from hpcsgd.topology import TOPOLOGIES, Topology, build
from hpcsgd.topology.mixing import TOLERANCE

_FLOAT32 = 4


@dataclass(frozen=True)
class MessageCounts:
    """The messages of a topology, one model each."""

    #: Smallest and largest number of models that a peer reads in a step.
    least: int
    most: int
    messages: float  # number of models that all peers together read in a step, on average over a period


def count_messages(topology: Topology) -> MessageCounts:
    """Count the messages of one period."""
    matrices = (topology.matrix(step) for step in range(topology.period))
    read = np.array([np.count_nonzero(matrix - np.diag(np.diag(matrix)), axis=1) for matrix in matrices])
    return MessageCounts(int(read.min()), int(read.max()), float(read.sum() / topology.period))


def steps_to_halve(topology: Topology) -> int | None:
    """Return the steps after which at most half of any disagreement is left; None if it may never be.

    Exact within the first period; beyond it the bound from whole periods.
    """
    product = np.eye(topology.size)
    for step in range(topology.period):
        product = topology.matrix(step) @ product
        if np.linalg.norm(product - 1 / topology.size, 2) <= 0.5 + TOLERANCE:
            return step + 1
    remaining = topology.second_singular_value()
    return topology.period * ceil(log(0.5) / log(remaining)) if remaining < 1 - TOLERANCE else None


def details(topology: Topology, spec: str, parameters: int) -> Table:
    """Return the table of one topology; `parameters` is the number of float32 parameters of a model."""
    table = Table(title=escape(f"{spec}, {topology.size} peers"), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in zip(_NAMES, _values(topology, parameters), strict=True):
        table.add_row(name, value)
    return table


def comparison(size: int, parameters: int) -> Group:
    """Return the table of all topologies with their default options, and the reasons why some are impossible.

    `parameters` is the number of float32 parameters of a model.
    """
    table = Table(title=f"Topologies of {size} peers")
    table.add_column("topology", no_wrap=True)
    for name in _NAMES:
        table.add_column(name, justify="right")
    impossible = []
    for name, options, _ in registry.describe(TOPOLOGIES, ["size"]):
        spec = f"{name}:{options.replace(',', '+')}" if options else name
        try:
            table.add_row(escape(spec), *_values(build(name, size), parameters))
        except HpcsgdError as error:
            why = "; ".join(" ".join(line.split()) for line in str(error).splitlines())
            impossible.append(escape(f"{spec}: {why}"))
    return Group(table, *impossible)


_NAMES = (
    "weights",
    "period (steps)",
    "models a peer reads a step",
    "spectral gap",
    "steps to halve disagreement",
    "exact mean after",
    "messages a step",
    "bytes a step",
)


def _values(topology: Topology, parameters: int) -> Iterator[str]:
    counts, halving = count_messages(topology), steps_to_halve(topology)
    yield "directed" if topology.directed else "symmetric"
    yield str(topology.period)
    yield str(counts.most) if counts.least == counts.most else f"{counts.least}..{counts.most}"
    yield f"{topology.spectral_gap():.4g}"
    yield "never" if halving is None else str(halving)
    yield f"{topology.period} step{'s' * (topology.period > 1)}" if topology.exact else "never"
    yield f"{counts.messages:.4g}"
    yield decimal(round(_FLOAT32 * parameters * counts.messages))
