"""Tokens: the few models of TELEPORTATION, which peers hold them when, and how they get there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.peers import Peers
from hpcsgd.errors import BadOption
from hpcsgd.strategies.teleportation.token_transfer import Move
from hpcsgd.topology import build

_DEFAULT = 4


class Tokens:
    """A schedule that all ranks know without a message.

    Parameters
    ----------
    peers
        Who may hold a token.
    active
        How many tokens; None: 4, or as many as there are peers where these are fewer. Several numbers:
        as many groups of tokens that have nothing to do with one another.
    topology
        Over the tokens of a group.
    seed
        Of the schedule.

    Raises
    ------
    BadOption
        More tokens than peers, or no such topology over so many.
    """

    def __init__(self, peers: Peers, active: int | tuple[int, ...] | None, topology: str, seed: int) -> None:
        active = min(_DEFAULT, peers.size) if active is None else active
        self.sizes = active if isinstance(active, tuple) else (active,)
        self.count = sum(self.sizes)
        if self.count > peers.size:
            raise BadOption(
                f"TELEPORTATION with {self.count} active peers",
                expected=f"at most {peers.size}, the number of peers",
                do=f"use active={peers.size} or fewer, more ranks, or virtual nodes",
                everywhere=True,
            )
        self._graphs = peers.world.together(lambda: [build(topology, size) for size in self.sizes])
        self._firsts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        self._peers, self._seed = peers, seed

    def group(self, number: int, step: int) -> tuple[int, ...]:
        """The peers that hold the tokens of one group in an iteration."""
        first = self._firsts[number]
        return self.holders(step)[first : first + self.sizes[number]]

    def rows(self, step: int) -> list[list[tuple[int, float]]]:
        """For each token which tokens it becomes the weighted sum of."""
        return [
            [(first + token, weight) for token, weight in graph.row(own, step)]
            for graph, first in zip(self._graphs, self._firsts, strict=True)
            for own in range(graph.size)
        ]

    def holders(self, step: int) -> tuple[int, ...]:
        """The peers that hold token 0, 1, ... in an iteration."""
        return draw(self._seed, step, self._peers.size, self.count)

    def here(self, step: int) -> list[int]:
        """Those of them that live on this rank, by token."""
        return [peer for peer in self.holders(step) if peer in self._peers.local]

    def moves(self, step: int, exchanges: Sequence[Exchange], fused: bool) -> list[Move]:
        """What takes place between an iteration's steps and the next ones.

        The first exchange is that of the models, which are averaged; what the others have is not.
        """
        models, *others = exchanges
        now, after, rows = self.holders(step), self.holders(step + 1), self.rows(step)
        alone = [[(token, 1.0)] for token in range(self.count)]
        if fused:
            moves = [Move(models, step, now, after, rows)]
        else:
            moves = [Move(models, 2 * step, now, now, rows), Move(models, 2 * step + 1, now, after, alone)]
        return [Move(other, step, now, after, alone) for other in others] + moves


@lru_cache(maxsize=64)
def draw(seed: int, step: int, size: int, count: int) -> tuple[int, ...]:
    """`count` of `size` peers in random order; any step directly, and the same in all versions of NumPy."""
    numbers = np.random.Philox(key=[seed % 2**64, step]).random_raw(size)
    return tuple(np.argsort(numbers, kind="stable")[:count].tolist())
