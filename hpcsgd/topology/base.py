"""Interface of topologies: sequences of mixing matrices over the peers of a gossip method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property, reduce
from typing import TypeAlias

import numpy as np

from hpcsgd.errors import HpcsgdError
from hpcsgd.registry import checked
from hpcsgd.registry.limits import PeerCount
from hpcsgd.topology.graphs import spanning
from hpcsgd.topology.mixing import TOLERANCE, Edge, Matrix, check_mixing_matrix, metropolis, unreachable

Point: TypeAlias = tuple[float, float]


class Topology(ABC):
    """A sequence of mixing matrices over the peers of a gossip method.

    A subclass implements `build`, or `Graph.edges_at`, and sets `period` if its matrices vary. The matrices
    are checked on first use: they must be doubly stochastic, and connected over a period.

    Parameters
    ----------
    size
        Number of peers, at least 1.

    Attributes
    ----------
    size
        Number of peers.
    period
        Number of steps after which the sequence of matrices repeats.
    directed
        Whether W_ij may differ from W_ji.

    Raises
    ------
    BadOption
        `size` below 1, or too large for a matrix.
    """

    period: int = 1
    directed: bool = False

    @checked
    def __init__(self, size: PeerCount) -> None:
        self.size = size
        self._neighbours: dict[tuple[int, int], tuple[list[tuple[int, float]], list[int], list[int]]] = {}

    @abstractmethod
    def build(self, step: int) -> Matrix:
        """Return the mixing matrix of a step from 0 to `period` - 1, as a new array."""

    def matrix(self, step: int = 0) -> Matrix:
        """Return the mixing matrix of a step: x_i <- sum_j W[i, j] x_j.

        Parameters
        ----------
        step
            Any step of a run; matrices repeat after `period`. Default 0.

        Returns
        -------
        ndarray, float64, shape (size, size)
            Read-only, and the same object in each call.

        Raises
        ------
        HpcsgdError
            The matrices of this topology are not doubly stochastic, or not connected over a period.
        """
        return self._matrices[step % self.period]

    def row(self, peer: int, step: int = 0) -> list[tuple[int, float]]:
        """Return the (source, weight) pairs of a peer's next model, itself included, ascending by source."""
        return list(self._neighbourhood(peer, step)[0])

    def sources(self, peer: int, step: int = 0) -> list[int]:
        """Return the other peers whose models a peer reads, ascending."""
        return list(self._neighbourhood(peer, step)[1])

    def readers(self, peer: int, step: int = 0) -> list[int]:
        """Return the other peers that read a peer's model, ascending."""
        return list(self._neighbourhood(peer, step)[2])

    def edges(self) -> list[Edge]:
        """Return all pairs (a, b), a < b, that mix in a step of a period, in either direction; sorted."""
        used = reduce(np.logical_or, (matrix > 0 for matrix in self._matrices))
        return [(int(a), int(b)) for a, b in np.argwhere(np.triu(used | used.T, 1))]

    def spanning(self) -> list[Edge]:
        """Return edges that connect all peers: a Hamiltonian path if a short search finds one, else a tree.

        The path 0, 1, 2, ... is used where it exists; the tree is that of a breadth-first search from peer 0.
        Each edge is a pair (a, b) with a < b; the edges of a path are in its order. The result is
        deterministic. It is the set P of DTUR (Xiong et al., arXiv 2102.06280).
        """
        return spanning(self.size, self.edges())

    def product(self) -> Matrix:
        """Return the product of one period, W(period - 1) ... W(1) W(0), float64 of shape (size, size)."""
        return reduce(lambda done, matrix: matrix @ done, self._matrices)

    def second_singular_value(self) -> float:
        """Return the factor by which one period reduces the consensus distance, in the worst case.

        The consensus distance is the L2 distance of the models from their mean.

        Values below 1e-12 are returned as 0: the root of a rounding error would look like a slow topology.
        """
        value = float(np.linalg.norm(self.product() - 1 / self.size, 2))
        return value if value > TOLERANCE else 0.0

    def spectral_gap(self) -> float:
        """Return the spectral gap of a step: the minimum decrease of the consensus distance, as a fraction.

        It is 1 - s ** (1 / period), where s is the second largest singular value of the product of one
        period, and the consensus distance is the L2 distance of the models from their mean. For one symmetric
        matrix it is the usual 1 - max(abs(lambda_2), abs(lambda_n)). 1 means the exact mean after a period.
        """
        return 1 - float(self.second_singular_value() ** (1 / self.period))

    def layout(self) -> list[Point]:
        """Return the position of each peer in a drawing: on a circle, clockwise from the top."""
        angles = 2 * np.pi * np.arange(self.size) / self.size
        return list(zip(np.sin(angles).tolist(), np.cos(angles).tolist(), strict=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size})"

    @property
    def exact(self) -> bool:
        """Whether one period gives every peer the exact mean."""
        return self.second_singular_value() == 0

    @cached_property
    def _matrices(self) -> tuple[Matrix, ...]:
        matrices = tuple(self.build(step) for step in range(self.period))
        for step, matrix in enumerate(matrices):
            where = f" at step {step}" if self.period > 1 else ""
            check_mixing_matrix(matrix, self.size, self.directed, f"{self!r}{where}")
            matrix.flags.writeable = False
        if apart := unreachable(matrices):
            raise HpcsgdError(
                f"{self!r} is not connected",
                expected="a path from peer 0 to every peer",
                got=f"no path to peer {apart[0]}",
                do="add edges: models of peers that are not connected never converge to their mean",
            )
        return matrices

    def _neighbourhood(self, peer: int, step: int) -> tuple[list[tuple[int, float]], list[int], list[int]]:
        key = peer, step % self.period
        if key not in self._neighbours:
            if not 0 <= peer < self.size:
                raise HpcsgdError(f"{self!r} has no such peer", expected=f"0 to {self.size - 1}", got=peer)
            matrix = self.matrix(step)
            weights, reading = matrix[peer], np.flatnonzero(matrix[:, peer])
            row = [(int(j), float(weights[j])) for j in np.flatnonzero(weights)]
            sources = [j for j, _ in row if j != peer]
            self._neighbours[key] = row, sources, [int(j) for j in reading if j != peer]
        return self._neighbours[key]


class Graph(Topology):
    """An undirected graph with Metropolis-Hastings weights."""

    @abstractmethod
    def edges_at(self, step: int) -> Iterable[Edge]:
        """Return the pairs of peers that mix at a step from 0 to `period` - 1."""

    def build(self, step: int) -> Matrix:
        """Return the Metropolis-Hastings weights of the step's edges."""
        return metropolis(self.size, self.edges_at(step))
