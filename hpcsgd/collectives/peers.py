"""Peers: who takes part in a gossip method, and on which rank each of them lives."""

from __future__ import annotations

from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World


class Peers:
    """The participants of a method: one a rank, or several (virtual nodes), in blocks by rank.

    Parameters
    ----------
    world
        The ranks.
    size
        How many peers; a multiple of the number of ranks. Default: one a rank.

    Attributes
    ----------
    size, each
        Peers in all, and on each rank.
    local
        Those of this rank.

    Raises
    ------
    BadOption
        Where the peers cannot be shared out evenly.
    """

    def __init__(self, world: World, size: int | None = None) -> None:
        self.world = world
        self.size = world.size if size is None else size
        if self.size < 1 or self.size % world.size:
            raise BadOption(
                "virtual nodes are shared out evenly",
                expected=f"a multiple of the number of ranks, {world.size}",
                got=size,
                do=f"use {max(1, round(self.size / world.size)) * world.size}, or another number of ranks",
                everywhere=True,
            )
        self.each = self.size // world.size
        self.local = range(world.rank * self.each, (world.rank + 1) * self.each)

    def rank_of(self, peer: int) -> int:
        """The rank on which a peer lives."""
        return peer // self.each

    def index(self, peer: int) -> int:
        """The place of a peer among those of its rank."""
        return peer % self.each
