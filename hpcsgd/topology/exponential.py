"""The exponential graph, static and one-peer (Ying et al., arXiv 2110.13363)."""

from __future__ import annotations

import numpy as np

from hpcsgd.topology.base import Topology
from hpcsgd.topology.mixing import Matrix


class ExponentialGraph(Topology):
    """Peer i reads i - 1, i - 2, i - 4, ... modulo the number of peers, all with equal weights.

    Directed and static: Ying et al., "Exponential Graph is Provably Efficient for Decentralized Deep
    Training", arXiv 2110.13363.
    """

    directed = True

    def build(self, step: int) -> Matrix:
        """Return the weights: 1 / (sources + 1) for each source and the peer itself."""
        strides = [1 << power for power in range(_powers(self.size))]
        return sum((_shift(self.size, stride) for stride in strides), np.eye(self.size)) / (len(strides) + 1)


class OnePeerExponentialGraph(Topology):
    """At step t peer i reads only i - 2 ** (t mod p), p = ceil(log2(size)), with weight 1/2.

    Directed and time-varying. After p steps the exact mean, if `size` is a power of two (Ying et al., arXiv
    2110.13363); the graph of stochastic gradient push (Assran et al., arXiv 1811.10792).
    """

    directed = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.period = max(1, _powers(size))

    def build(self, step: int) -> Matrix:
        """Return the weights: 1/2 for the peer itself and 1/2 for the step's source."""
        return (np.eye(self.size) + _shift(self.size, 1 << step)) / 2


def _powers(size: int) -> int:
    """Return the number of powers of two below `size`."""
    return (size - 1).bit_length()


def _shift(size: int, stride: int) -> Matrix:
    """Return the matrix in which i reads i - stride."""
    return np.roll(np.eye(size), stride, axis=0)
