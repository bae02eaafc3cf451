"""Tokens: the few models of TELEPORTATION, their holders in each iteration, and their transfers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.peers import Peers
from hpcsgd.errors import BadOption
from hpcsgd.strategies.teleportation.token_transfer import TokenTransfer
from hpcsgd.topology import build

_DEFAULT = 4


class Tokens:
    """The holders of all tokens in each iteration, which every rank computes without a message.

    Parameters
    ----------
    peers
        All peers.
    active
        Number of tokens; None: 4, or the number of peers if that is smaller. Several numbers: as many
        groups of tokens, which are averaged separately.
    topology
        The topology over the tokens of a group.
    seed
        Seed of the holders.

    Attributes
    ----------
    sizes
        Number of tokens of each group.
    count
        Number of all tokens.

    Raises
    ------
    BadOption
        More tokens than peers, or the topology does not exist for so many tokens.
    """

    def __init__(self, peers: Peers, active: int | tuple[int, ...] | None, topology: str, seed: int) -> None:
        active = min(_DEFAULT, peers.size) if active is None else active
        self.sizes = active if isinstance(active, tuple) else (active,)
        self.count = sum(self.sizes)
        if self.count > peers.size:
            raise BadOption(
                f"TELEPORTATION cannot have {self.count} active peers",
                expected=f"at most {peers.size}, the number of peers",
                do=f"use active={peers.size} or fewer, more ranks, or virtual nodes",
                everywhere=True,
            )
        self._graphs = peers.world.collectively(lambda: [build(topology, size) for size in self.sizes])
        self._firsts = [sum(self.sizes[:number]) for number in range(len(self.sizes))]
        self._peers, self._seed = peers, seed

    def group(self, number: int, step: int) -> tuple[int, ...]:
        """Return the holders of the tokens of one group in an iteration."""
        first = self._firsts[number]
        return self.holders(step)[first : first + self.sizes[number]]

    def rows(self, step: int) -> list[list[tuple[int, float]]]:
        """Return for each token the (token, weight) pairs of its average in an iteration."""
        return [
            [(first + token, weight) for token, weight in graph.row(row, step)]
            for graph, first in zip(self._graphs, self._firsts, strict=True)
            for row in range(graph.size)
        ]

    def holders(self, step: int) -> tuple[int, ...]:
        """Return the peers that hold token 0, 1, ... in an iteration."""
        return sample_holders(self._seed, step, self._peers.size, self.count)

    def local_holders(self, step: int) -> list[int]:
        """Return the holders on this rank in an iteration, ordered by token."""
        return [peer for peer in self.holders(step) if peer in self._peers.local]

    def transfers(self, step: int, exchanges: Sequence[Exchange], fused: bool) -> list[TokenTransfer]:
        """Return the transfers after the steps of an iteration, in order.

        Parameters
        ----------
        step
            The iteration.
        exchanges
            The first one is that of the models, which are averaged; tensors of the others are only moved.
        fused
            Average and move the models in one transfer, not in two.
        """
        models, *others = exchanges
        now, after, rows = self.holders(step), self.holders(step + 1), self.rows(step)
        identity = [[(token, 1.0)] for token in range(self.count)]
        if fused:
            transfers = [TokenTransfer(models, step, now, after, rows)]
        else:
            transfers = [
                TokenTransfer(models, 2 * step, now, now, rows),
                TokenTransfer(models, 2 * step + 1, now, after, identity),
            ]
        return [TokenTransfer(other, step, now, after, identity) for other in others] + transfers


@lru_cache(maxsize=64)
def sample_holders(seed: int, step: int, size: int, count: int) -> tuple[int, ...]:
    """Return `count` of `size` peers in random order.

    A function of the arguments alone, without the steps before, and equal in all versions of NumPy.
    """
    numbers = np.random.Philox(key=[seed % 2**64, step]).random_raw(size)
    return tuple(np.argsort(numbers, kind="stable")[:count].tolist())
