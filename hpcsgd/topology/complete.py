"""The complete graph."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from hpcsgd.topology.base import Graph
from hpcsgd.topology.mixing import Link


class Complete(Graph):
    """Each peer mixes with all others: the exact mean in one step.

    Parameters
    ----------
    size
        Peers.
    """

    def links(self, step: int) -> Iterator[Link]:
        """All pairs."""
        return combinations(range(self.size), 2)
