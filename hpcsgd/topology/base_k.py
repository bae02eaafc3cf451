"""The Base-(k+1) graph: the exact mean after few rounds of few links, for any number of peers."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod

import numpy as np

from hpcsgd.errors import BadOption
from hpcsgd.topology.base import Topology
from hpcsgd.topology.hyper_hypercube import Round, clique, factors, hyper_hypercube, merged
from hpcsgd.topology.mixing import Matrix

Blocks = list[Sequence[int]]


class BaseGraph(Topology):
    """At most k links a step, and after one period the exact mean, for any number of peers.

    The Base-(k+1) graph of Takezawa et al., "Beyond Exponential Graph: Communication-Efficient Topologies
    for Decentralized Learning via Finite-time Convergence", arXiv 2305.11420. Its period is at most
    2 log_{k+1}(size) + 2.

    Parameters
    ----------
    size
        Peers.
    k
        The most links of a peer in a step, at least 1.

    Raises
    ------
    BadOption
        `k` below 1.
    """

    def __init__(self, size: int, k: int = 1) -> None:
        super().__init__(size)
        if k < 1:
            raise BadOption("a base graph needs links", expected="k of at least 1", got=k)
        self._rounds = base(range(size), k) or [{}]
        self.period = len(self._rounds)

    def build(self, step: int) -> Matrix:
        """The links of the round; the rest of a peer's weight is its own."""
        matrix = np.zeros((self.size, self.size))
        for (a, b), weight in self._rounds[step].items():
            matrix[a, b] = matrix[b, a] = weight
        np.fill_diagonal(matrix, 1 - matrix.sum(axis=1))
        return matrix


def base(peers: Sequence[int], degree: int) -> list[Round]:
    """The rounds of the Base-(k+1) graph: of two constructions the shorter one.

    One is `simple_base`. The other cuts the peers into as many equal blocks as `hyper_hypercube` can
    join, takes the mean of each by `simple_base`, and then the mean across blocks.
    """
    count = len(peers)
    blocks = prod(gcd(count, prime ** count.bit_length()) for prime in _primes(degree + 1))
    width = count // blocks
    inside = [simple_base(peers[i * width : (i + 1) * width], degree) for i in range(blocks)]
    across = [hyper_hypercube(peers[i::width], degree) for i in range(width)]
    return min(_at_once(inside) + _at_once(across), simple_base(peers, degree), key=len)


def simple_base(peers: Sequence[int], degree: int) -> list[Round]:
    """The rounds of the Simple Base-(k+1) graph.

    The peers are cut into groups by the digits of their number in base k + 1, the largest first. Each
    group takes its mean; then each in turn meets all smaller ones, so that the mean of each of its
    blocks, powers of k + 1 in size, is the mean of all; then each takes the means of its blocks.
    """
    if factors(len(peers), degree + 1) is not None:
        return hyper_hypercube(peers, degree)
    groups = _groups(peers, degree + 1)
    wholes: Blocks = [[peer for block in blocks for peer in block] for blocks in groups]
    means = [hyper_hypercube(whole, degree) for whole in wholes]
    ends = [
        _at_once([hyper_hypercube(block, degree) for block in blocks]) or hyper_hypercube(whole, degree)
        for blocks, whole in zip(groups, wholes, strict=True)
    ]
    meetings, last = [_meeting(groups[i:], degree) for i in range(len(groups) - 1)], len(groups) - 1
    rounds = [merged(_cycle(mean, step) for mean in means) for step in range(len(means[0]))]
    for step in range(1 + len(ends[0])):
        met = [end for i, end in enumerate(ends) if step >= min(i + 1, last)]
        parts = [_cycle(end, step - min(i + 1, last)) for i, end in enumerate(met)]
        rounds.append(merged(meetings[step : step + 1] + parts))
    return rounds


def _meeting(groups: Sequence[Blocks], degree: int) -> Round:
    """Each peer of the smaller groups links to one of each block of the first; its others mix in cliques."""
    blocks, smaller = groups[0], [peer for group in groups[1:] for block in group for peer in block]
    here = sum(map(len, blocks))
    weight = here / (here + len(smaller)) / len(blocks)
    left = [peer for block in blocks for peer in block[: len(block) - len(smaller)]]
    linked = (block[len(block) - len(smaller) :] for block in blocks)
    links = {(a, b): weight for chosen in linked for a, b in zip(chosen, smaller, strict=True)}
    cliques = (clique(left[i : i + degree + 1]) for i in range(0, len(left), degree + 1))
    return merged([links, *cliques])


def _groups(peers: Sequence[int], radix: int) -> list[Blocks]:
    """Blocks of `radix` ** p peers, as many as the digit says, for each digit but 0, the highest first."""
    groups, start, width = [], 0, 1
    while width * radix <= len(peers):
        width *= radix
    while width:
        if digit := (len(peers) - start) // width:
            groups.append([peers[start + i * width : start + (i + 1) * width] for i in range(digit)])
            start += digit * width
        width //= radix
    return groups


def _at_once(rounds: Sequence[list[Round]]) -> list[Round]:
    """Sequences of the same length over different peers, side by side."""
    return [merged(parts) for parts in zip(*rounds, strict=True)]


def _cycle(rounds: Sequence[Round], step: int) -> Round:
    """Round `step` of a sequence that starts again: who has its mean already goes on mixing."""
    return rounds[step % len(rounds)] if rounds else {}


def _primes(largest: int) -> list[int]:
    return [n for n in range(2, largest + 1) if all(n % d for d in range(2, n))]
