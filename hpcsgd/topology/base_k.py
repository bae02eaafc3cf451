"""The Base-(k+1) graph: the exact mean in few steps with few edges a peer, for any number of peers."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Annotated

import numpy as np

from hpcsgd.registry import Within, checked
from hpcsgd.topology.base import Topology
from hpcsgd.topology.hyper_hypercube import WeightedEdges, clique, factorise, hyper_hypercube, union
from hpcsgd.topology.mixing import Matrix

Blocks = list[Sequence[int]]


class BaseGraph(Topology):
    """At most k edges a peer and step, and the exact mean after one period, for any number of peers.

    The Base-(k+1) graph of Takezawa et al., "Beyond Exponential Graph: Communication-Efficient Topologies
    for Decentralized Learning via Finite-time Convergence", arXiv 2305.11420. Its period is at most
    2 log_{k+1}(size) + 2.

    Parameters
    ----------
    size
        Number of peers.
    k
        Maximum number of edges of a peer in a step, at least 1. Default 1.
    """

    @checked
    def __init__(self, size: int, k: Annotated[int, Within(1, 10_000)] = 1) -> None:
        super().__init__(size)
        self._steps = base_graph(range(size), k) or [{}]
        self.period = len(self._steps)

    def build(self, step: int) -> Matrix:
        """Return the weights of the step's edges; the rest of a peer's weight is its own."""
        matrix = np.zeros((self.size, self.size))
        for (a, b), weight in self._steps[step].items():
            matrix[a, b] = matrix[b, a] = weight
        np.fill_diagonal(matrix, 1 - matrix.sum(axis=1))
        return matrix


def base_graph(peers: Sequence[int], degree: int) -> list[WeightedEdges]:
    """Return the steps of the Base-(k+1) graph: the shorter of two constructions.

    One is `simple_base_graph`. The other divides the peers into as many equal blocks as `hyper_hypercube` can
    average, averages within blocks by `simple_base_graph`, and then across blocks.
    """
    count = len(peers)
    blocks = prod(gcd(count, prime ** count.bit_length()) for prime in _primes(min(degree + 1, count)))
    width = count // blocks
    within = [simple_base_graph(peers[i * width : (i + 1) * width], degree) for i in range(blocks)]
    across = [hyper_hypercube(peers[i::width], degree) for i in range(width)]
    return min(_in_parallel(within) + _in_parallel(across), simple_base_graph(peers, degree), key=len)


def simple_base_graph(peers: Sequence[int], degree: int) -> list[WeightedEdges]:
    """Return the steps of the Simple Base-(k+1) graph.

    The peers are divided into groups by the digits of their number in base k + 1, the largest first. Each
    group is averaged; then each in turn is linked to all smaller ones, after which the mean of each of its
    blocks, whose sizes are powers of k + 1, is the mean of all peers; then each group is averaged within its
    blocks.
    """
    if factorise(len(peers), degree + 1) is not None:
        return hyper_hypercube(peers, degree)
    groups = _groups(peers, degree + 1)
    members: Blocks = [[peer for block in blocks for peer in block] for blocks in groups]
    first = [hyper_hypercube(group, degree) for group in members]
    final = [
        _in_parallel([hyper_hypercube(block, degree) for block in blocks]) or hyper_hypercube(group, degree)
        for blocks, group in zip(groups, members, strict=True)
    ]
    cross, last = [_cross_edges(groups[i:], degree) for i in range(len(groups) - 1)], len(groups) - 1
    steps = [union(_cyclic(edges, step) for edges in first) for step in range(len(first[0]))]
    for step in range(1 + len(final[0])):
        linked = [edges for i, edges in enumerate(final) if step >= min(i + 1, last)]
        parts = [_cyclic(edges, step - min(i + 1, last)) for i, edges in enumerate(linked)]
        steps.append(union(cross[step : step + 1] + parts))
    return steps


def _cross_edges(groups: Sequence[Blocks], degree: int) -> WeightedEdges:
    """Connect each peer of the smaller groups to one of each block of the first; other peers form cliques."""
    blocks, smaller = groups[0], [peer for group in groups[1:] for block in group for peer in block]
    size = sum(map(len, blocks))
    weight = size / (size + len(smaller)) / len(blocks)
    others = [peer for block in blocks for peer in block[: len(block) - len(smaller)]]
    linked = (block[len(block) - len(smaller) :] for block in blocks)
    edges = {(a, b): weight for ends in linked for a, b in zip(ends, smaller, strict=True)}
    cliques = (clique(others[i : i + degree + 1]) for i in range(0, len(others), degree + 1))
    return union([edges, *cliques])


def _groups(peers: Sequence[int], radix: int) -> list[Blocks]:
    """Return blocks of `radix` ** place peers, as many as the digit of that place, highest place first."""
    groups, start, width = [], 0, 1
    while width * radix <= len(peers):
        width *= radix
    while width:
        if digit := (len(peers) - start) // width:
            groups.append([peers[start + i * width : start + (i + 1) * width] for i in range(digit)])
            start += digit * width
        width //= radix
    return groups


def _in_parallel(sequences: Sequence[list[WeightedEdges]]) -> list[WeightedEdges]:
    """Combine sequences of equal length over disjoint peers, step by step."""
    return [union(parts) for parts in zip(*sequences, strict=True)]


def _cyclic(steps: Sequence[WeightedEdges], step: int) -> WeightedEdges:
    """Return a step of a periodic sequence: peers that hold their mean continue mixing."""
    return steps[step % len(steps)] if steps else {}


def _primes(largest: int) -> list[int]:
    return [n for n in range(2, largest + 1) if all(n % d for d in range(2, n))]
