"""The ring."""

from __future__ import annotations

from collections.abc import Iterator

from hpcsgd.topology.base import Graph
from hpcsgd.topology.mixing import Edge


class Ring(Graph):
    """Each peer mixes with its predecessor and its successor."""

    def edges_at(self, step: int) -> Iterator[Edge]:
        """Return (i, i + 1), and (size - 1, 0)."""
        return ((i, (i + 1) % self.size) for i in range(self.size) if self.size > 1)
