"""Peers: the models that take part in a gossip method, and their assignment to ranks."""

from __future__ import annotations

from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World


class Peers:
    """The models that take part in a method: one a rank, or several (virtual nodes), in blocks by rank.

    Parameters
    ----------
    world
        The ranks.
    size
        Number of peers, a multiple of the number of ranks. Default: one a rank.

    Attributes
    ----------
    size, per_rank
        Number of peers in all, and on each rank.
    local
        The peers of this rank.

    Raises
    ------
    BadOption
        The number of peers is not a multiple of the number of ranks.
    """

    def __init__(self, world: World, size: int | None = None) -> None:
        self.world = world
        self.size = world.size if size is None else size
        if self.size < 1 or self.size % world.size:
            raise BadOption(
                "virtual nodes cannot be divided evenly among the ranks",
                expected=f"a multiple of the number of ranks, {world.size}",
                got=size,
                do=f"use virtual_nodes={max(1, round(self.size / world.size)) * world.size} "
                "(--virtual-nodes), or another number of ranks",
                everywhere=True,
            )
        self.per_rank = self.size // world.size
        self.local = range(world.rank * self.per_rank, (world.rank + 1) * self.per_rank)

    def rank_of(self, peer: int) -> int:
        """Return the rank of a peer."""
        return peer // self.per_rank

    def index(self, peer: int) -> int:
        """Return the index of a peer among the peers of its rank."""
        return peer % self.per_rank
