"""What topologies cost and how fast they mix, as tables."""

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
class Traffic:
    """The messages of a topology, one model each.

    Parameters
    ----------
    least, most
        Models that a peer reads in a step, over all peers and steps of a period.
    messages
        Models that all peers read in a step, on average over a period.
    """

    least: int
    most: int
    messages: float


def traffic(topology: Topology) -> Traffic:
    """Count the messages of one period."""
    matrices = (topology.matrix(step) for step in range(topology.period))
    read = np.array([np.count_nonzero(matrix - np.diag(np.diag(matrix)), axis=1) for matrix in matrices])
    return Traffic(int(read.min()), int(read.max()), float(read.sum() / topology.period))


def steps_to_halve(topology: Topology) -> int | None:
    """Steps from the first that leave at most half of any disagreement; None where it may stay for ever.

    Exact within the first period; after that the bound that whole periods give.
    """
    product = np.eye(topology.size)
    for step in range(topology.period):
        product = topology.matrix(step) @ product
        if np.linalg.norm(product - 1 / topology.size, 2) <= 0.5 + TOLERANCE:
            return step + 1
    kept = topology.second_singular_value()
    return topology.period * ceil(log(0.5) / log(kept)) if kept < 1 - TOLERANCE else None


def details(topology: Topology, spec: str, parameters: int) -> Table:
    """All that is known of one topology.

    Parameters
    ----------
    topology
        The topology.
    spec
        What it was made from, the title.
    parameters
        Numbers of a model, each a float32.
    """
    table = Table(title=escape(f"{spec}, {topology.size} peers"), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in zip(_NAMES, _values(topology, parameters), strict=True):
        table.add_row(name, value)
    return table


def comparison(size: int, parameters: int) -> Group:
    """All families over so many peers, with their default options, and why some are impossible.

    Parameters
    ----------
    size
        Peers.
    parameters
        Numbers of a model, each a float32.
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
    counted, halving = traffic(topology), steps_to_halve(topology)
    yield "directed" if topology.directed else "symmetric"
    yield str(topology.period)
    yield str(counted.most) if counted.least == counted.most else f"{counted.least}..{counted.most}"
    yield f"{topology.spectral_gap():.4g}"
    yield "never" if halving is None else str(halving)
    yield f"{topology.period} step{'s' * (topology.period > 1)}" if topology.exact else "never"
    yield f"{counted.messages:.4g}"
    yield decimal(round(_FLOAT32 * parameters * counted.messages))
