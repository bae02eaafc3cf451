"""The complete graph."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from hpcsgd.topology.base import Graph
from hpcsgd.topology.mixing import Edge


class Complete(Graph):
    """Each peer mixes with all others: the exact mean in one step."""

    def edges_at(self, step: int) -> Iterator[Edge]:
        """Return all pairs."""
        return combinations(range(self.size), 2)
