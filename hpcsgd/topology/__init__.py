"""Topologies of gossip: mixing matrices over the peers, one file a family. NumPy alone: no MPI, no torch."""

from __future__ import annotations

from collections.abc import Callable

from hpcsgd import registry
from hpcsgd.topology.base import Graph, Topology
from hpcsgd.topology.base_k import BaseGraph
from hpcsgd.topology.complete import Complete
from hpcsgd.topology.edge_list import File
from hpcsgd.topology.exponential import Exponential, OnePeerExponential
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
    "Exponential",
    "File",
    "Graph",
    "Hypercube",
    "OnePeerExponential",
    "RandomRegular",
    "Ring",
    "Star",
    "Topology",
    "Torus",
    "build",
    "metropolis",
]

#: What a strategy's option `topology` and `hpcsgd topology` know.
TOPOLOGIES: dict[str, Callable[..., Topology]] = {
    "ring": Ring,
    "torus": Torus,
    "star": Star,
    "complete": Complete,
    "hypercube": Hypercube,
    "exponential": Exponential,
    "one-peer-exponential": OnePeerExponential,
    "base": BaseGraph,
    "random-regular": RandomRegular,
    "file": File,
}


def build(spec: str, size: int) -> Topology:
    """Make a topology from ``NAME`` or ``NAME:key=value+key=value`` and check its matrices.

    Parameters
    ----------
    spec
        A name of `TOPOLOGIES` and its options, with ``+`` between them because a strategy separates its
        own options by commas.
    size
        Peers.

    Raises
    ------
    BadOption
        Unknown name or option, or no such topology over so many peers.
    HpcsgdError
        Its matrices are not doubly stochastic, or not connected over a period.
    """
    topology = registry.build(TOPOLOGIES, spec.replace("+", ","), "topology", size=size)
    topology.matrix()
    return topology
