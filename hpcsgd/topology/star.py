"""The star."""

from __future__ import annotations

from collections.abc import Iterator

from hpcsgd.topology.base import Graph
from hpcsgd.topology.mixing import Edge


class Star(Graph):
    """Each peer mixes with peer 0 only."""

    def edges_at(self, step: int) -> Iterator[Edge]:
        """Return (0, i)."""
        return ((0, i) for i in range(1, self.size))
