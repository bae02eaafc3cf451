"""Topologies of gossip: mixing matrices over peers, one file a family. Needs NumPy only, no MPI or torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from hpcsgd import registry
from hpcsgd.topology.base import Graph, Topology
from hpcsgd.topology.base_k import BaseGraph
from hpcsgd.topology.complete import Complete
from hpcsgd.topology.edge_list import EdgeList
from hpcsgd.topology.exponential import ExponentialGraph, OnePeerExponentialGraph
from hpcsgd.topology.hypercube import Hypercube
from hpcsgd.topology.mixing import metropolis
from hpcsgd.topology.random_regular import RandomRegular
from hpcsgd.topology.ring import Ring
from hpcsgd.topology.star import Star
from hpcsgd.topology.torus import Torus

__all__ = [
    "TOPOLOGIES",
    "BaseGraph",
    "Complete",
    "EdgeList",
    "ExponentialGraph",
    "Graph",
    "Hypercube",
    "OnePeerExponentialGraph",
    "RandomRegular",
    "Ring",
    "Star",
    "Topology",
    "TopologySpec",
    "Torus",
    "build",
    "check",
    "metropolis",
]

#: The topologies of a strategy's option `topology` and of `hpcsgd topology`.
TOPOLOGIES: dict[str, Callable[..., Topology]] = {
    "ring": Ring,
    "torus": Torus,
    "star": Star,
    "complete": Complete,
    "hypercube": Hypercube,
    "exponential": ExponentialGraph,
    "one-peer-exponential": OnePeerExponentialGraph,
    "base": BaseGraph,
    "random-regular": RandomRegular,
    "file": EdgeList,
}


def build(spec: str, size: int) -> Topology:
    """Create a topology from ``NAME`` or ``NAME:key=value+key=value`` and check its matrices.

    Parameters
    ----------
    spec
        A name of `TOPOLOGIES` and its options, separated by ``+`` because a strategy separates its own
        options by commas.
    size
        Number of peers.

    Raises
    ------
    BadOption
        The name or an option is unknown, or the topology does not exist for `size` peers.
    HpcsgdError
        The matrices are not doubly stochastic, or not connected over a period.
    """
    topology = registry.build(TOPOLOGIES, spec.replace("+", ","), "topology", size=size)
    topology.matrix()
    return topology


def check(spec: str) -> None:
    """Check name and options of a spec, as far as they do not depend on the number of peers.

    Raises
    ------
    BadOption
        The name or an option is unknown, or a value is out of range.
    """
    registry.bind(TOPOLOGIES, spec.replace("+", ","), "topology", size=None)


#: A spec that `build` reads, as annotation of an option.
TopologySpec = Annotated[str, registry.Accepted(check)]
