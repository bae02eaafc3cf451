"""Rounds of links with weights, and the k-peer hyper-hypercube of Takezawa et al. (arXiv 2305.11420)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import TypeAlias

from hpcsgd.topology.mixing import Link

#: The weight of each link of one round; what a peer gives to no link stays with itself.
Round: TypeAlias = dict[Link, float]


def factors(count: int, largest: int) -> list[int] | None:
    """`count` as a product of factors of at most `largest`, ascending; None where it is not one."""
    found = []
    for factor in range(largest, 1, -1):
        while count % factor == 0:
            found.append(factor)
            count //= factor
    return found[::-1] if count == 1 else None


def clique(peers: Sequence[int]) -> Round:
    """All of some peers take their mean."""
    return dict.fromkeys(combinations(peers, 2), 1 / max(1, len(peers)))


def merged(rounds: Iterable[Round]) -> Round:
    """Rounds over different peers, at once."""
    return {link: weight for part in rounds for link, weight in part.items()}


def hyper_hypercube(peers: Sequence[int], degree: int) -> list[Round]:
    """Rounds after which all of some peers have their exact mean.

    Parameters
    ----------
    peers
        As many as a product of factors of at most `degree` + 1.
    degree
        The most links of a peer in a round.

    Returns
    -------
    list of Round
        One for each factor: cliques of so many peers, at the stride of the product of those before.
    """
    rounds, stride = [], 1
    for factor in factors(len(peers), degree + 1) or ():
        firsts = (i for i in range(len(peers)) if i // stride % factor == 0)
        rounds.append(merged(clique(peers[i : i + factor * stride : stride]) for i in firsts))
        stride *= factor
    return rounds
