"""The hypercube."""

from __future__ import annotations

from collections.abc import Iterator

from hpcsgd.errors import BadOption
from hpcsgd.topology.base import Graph
from hpcsgd.topology.mixing import Edge


class Hypercube(Graph):
    """Each peer mixes with the peers whose number differs from its own in one bit.

    Parameters
    ----------
    size
        Number of peers, a power of two.

    Raises
    ------
    BadOption
        `size` is not a power of two.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        if size & (size - 1):
            above = 1 << size.bit_length()
            do = f"use {above // 2} or {above} peers, or topology base, which supports any number"
            raise BadOption(
                "topology hypercube needs a power of two of peers", expected="1, 2, 4, ...", got=size, do=do
            )

    def edges_at(self, step: int) -> Iterator[Edge]:
        """Return (i, i with one more bit)."""
        bits = [1 << bit for bit in range(self.size.bit_length() - 1)]
        return ((peer, peer | bit) for peer in range(self.size) for bit in bits if not peer & bit)
