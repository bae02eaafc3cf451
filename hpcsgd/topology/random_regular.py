"""Random regular graphs."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from hpcsgd.errors import BadOption
from hpcsgd.topology.base import Graph
from hpcsgd.topology.graphs import connected
from hpcsgd.topology.mixing import Link


class RandomRegular(Graph):
    """A random connected graph in which each peer mixes with the same number of others.

    Parameters
    ----------
    size
        Peers.
    degree
        Others that each mixes with, at least 2 (1 for two peers), below `size`; `size * degree` is even.
        A single peer has none, whatever this says.
    seed
        What the graph is drawn from, at least 0: the same on all ranks.

    Raises
    ------
    BadOption
        No such graph exists, or `seed` is negative.
    """

    def __init__(self, size: int, degree: int = 3, seed: int = 0) -> None:
        super().__init__(size)
        if seed < 0:
            raise BadOption("a seed is not negative", got=f"seed={seed}")
        least = min(2, size - 1)
        if size > 1 and (not least <= degree < size or size * degree % 2):
            expected = "a degree below the number of peers, their product even, and above 1 to be connected"
            use = f"degree={least}" + f" to {size - 1}" * (size > 3) + ", even" * (size > 3 and size % 2)
            do = f"use {use}" + f"; or {max(size, degree) + 1} peers" * (degree > 1)
            got = f"{size} peers, degree={degree}"
            raise BadOption("no such regular graph", expected=expected, got=got, do=do)
        self._links = _draw(size, degree, np.random.default_rng(seed)) if size > 1 else set()

    def links(self, step: int) -> list[Link]:
        """What was drawn."""
        return sorted(self._links)


def _draw(size: int, degree: int, generator: np.random.Generator) -> set[Link]:
    """A dense graph is what a sparse one leaves, so that drawing is never a long search."""
    sparse = min(degree, size - 1 - degree)
    while True:
        links = _pair(size, sparse, generator)
        if links is not None and sparse < degree:
            links = set(combinations(range(size), 2)) - links
        if links is not None and connected(size, links):
            return links


def _pair(size: int, degree: int, generator: np.random.Generator) -> set[Link] | None:
    """Pair loose ends at random, again those that cannot be paired; None where none can be.

    Steger and Wormald, "Generating random regular graphs quickly", 1999.
    """
    links: set[Link] = set()
    ends = [peer for peer in range(size) for _ in range(degree)]
    while ends:
        loose = []
        shuffled = generator.permutation(ends).tolist()
        for a, b in zip(shuffled[::2], shuffled[1::2], strict=True):
            link = min(a, b), max(a, b)
            if a == b or link in links:
                loose += [a, b]
            else:
                links.add(link)
        if loose and all(link in links for link in combinations(sorted(set(loose)), 2)):
            return None
        ends = loose
    return links
