"""Random regular graphs."""

from __future__ import annotations

from itertools import combinations
from typing import Annotated

import numpy as np

from hpcsgd.errors import BadOption
from hpcsgd.registry import Within, checked
from hpcsgd.registry.limits import Seed
from hpcsgd.topology.base import Graph
from hpcsgd.topology.graphs import is_connected
from hpcsgd.topology.mixing import Edge


class RandomRegular(Graph):
    """A random connected graph in which all peers have equally many neighbours.

    Parameters
    ----------
    size
        Number of peers.
    degree
        Number of neighbours of a peer, at least 2 (1 for two peers) and below `size`; `size * degree` is
        even. Ignored for a single peer. Default 3.
    seed
        Seed of the random graph, at least 0, equal on all ranks. Default 0.

    Raises
    ------
    BadOption
        No such graph exists.
    """

    @checked
    def __init__(self, size: int, degree: Annotated[int, Within(1, 10_000)] = 3, seed: Seed = 0) -> None:
        super().__init__(size)
        least = min(2, size - 1)
        if size > 1 and (not least <= degree < size or size * degree % 2):
            expected = "a degree below the number of peers, their product even, and above 1 to be connected"
            use = f"degree={least}" + f" to {size - 1}" * (size > 3) + ", even" * (size > 3 and size % 2)
            do = f"use {use}" + f"; or {max(size, degree) + 1} peers" * (degree > 1)
            got = f"{size} peers, degree={degree}"
            raise BadOption("no regular graph of this degree exists", expected=expected, got=got, do=do)
        self._edges = _sample_graph(size, degree, np.random.default_rng(seed)) if size > 1 else set()

    def edges_at(self, step: int) -> list[Edge]:
        """Return the random edges."""
        return sorted(self._edges)


def _sample_graph(size: int, degree: int, generator: np.random.Generator) -> set[Edge]:
    """Sample a connected graph; a dense one is the complement of a sparse one, which is fast to sample."""
    sparse = min(degree, size - 1 - degree)
    while True:
        edges = _pair_stubs(size, sparse, generator)
        if edges is not None and sparse < degree:
            edges = set(combinations(range(size), 2)) - edges
        if edges is not None and is_connected(size, edges):
            return edges


def _pair_stubs(size: int, degree: int, generator: np.random.Generator) -> set[Edge] | None:
    """Pair stubs at random, and again those that formed no edge; None if the rest cannot form any.

    Steger and Wormald, "Generating random regular graphs quickly", 1999.
    """
    edges: set[Edge] = set()
    stubs = [peer for peer in range(size) for _ in range(degree)]
    while stubs:
        unpaired = []
        shuffled = generator.permutation(stubs).tolist()
        for a, b in zip(shuffled[::2], shuffled[1::2], strict=True):
            edge = min(a, b), max(a, b)
            if a == b or edge in edges:
                unpaired += [a, b]
            else:
                edges.add(edge)
        if unpaired and all(edge in edges for edge in combinations(sorted(set(unpaired)), 2)):
            return None
        stubs = unpaired
    return edges
