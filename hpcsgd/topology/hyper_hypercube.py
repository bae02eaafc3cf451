"""Weighted edges of a step, and the k-peer hyper-hypercube of Takezawa et al. (arXiv 2305.11420)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TypeAlias

from hpcsgd.topology.mixing import Edge

#: The weight of each edge of one step; the rest of a peer's weight is its own.
WeightedEdges: TypeAlias = dict[Edge, float]


def factorise(count: int, largest: int) -> list[int] | None:
    """Return factors of at most `largest`, ascending, whose product is `count`; None if there are none."""
    found = []
    for factor in range(largest, 1, -1):
        while count % factor == 0:
            found.append(factor)
            count //= factor
    return found[::-1] if count == 1 else None


def clique(peers: Sequence[int]) -> WeightedEdges:
    """Return the edges by which peers take their mean in one step."""
    return dict.fromkeys(combinations(peers, 2), 1 / max(1, len(peers)))


def union(parts: Iterable[WeightedEdges]) -> WeightedEdges:
    """Return the union of edges over disjoint peers."""
    return {edge: weight for part in parts for edge, weight in part.items()}


def hyper_hypercube(peers: Sequence[int], degree: int) -> list[WeightedEdges]:
    """Return the edges of steps after which the peers hold their exact mean.

    Parameters
    ----------
    peers
        The peers; their number is a product of factors of at most `degree` + 1.
    degree
        Maximum number of edges of a peer in a step.

    Returns
    -------
    list of WeightedLinks
        One for each factor: cliques of that many peers, whose stride is the product of the previous factors.
    """
    steps, stride = [], 1
    for factor in factorise(len(peers), degree + 1) or ():
        firsts = (i for i in range(len(peers)) if i // stride % factor == 0)
        steps.append(union(clique(peers[i : i + factor * stride : stride]) for i in firsts))
        stride *= factor
    return steps
