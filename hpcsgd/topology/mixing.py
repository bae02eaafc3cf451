"""Metropolis-Hastings weights of a graph, and the properties of a mixing matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from hpcsgd.errors import HpcsgdError

Matrix = NDArray[np.float64]
Edge = tuple[int, int]

#: Tolerance of comparisons of sums of weights and products of mixing matrices.
TOLERANCE = 1e-12


def metropolis(size: int, edges: Iterable[Edge]) -> Matrix:
    """Return Metropolis-Hastings weights: W_ij = 1 / (1 + max(deg_i, deg_j)) on edges, the rest in W_ii.

    Parameters
    ----------
    size
        Number of peers.
    edges
        Pairs of peers that exchange their models, in any order; duplicates are ignored.

    Returns
    -------
    ndarray, float64, shape (size, size)
        Symmetric and doubly stochastic, with a positive diagonal.

    Raises
    ------
    HpcsgdError
        An edge joins a peer to itself, or to one that does not exist.
    """
    pairs = sorted({(min(edge), max(edge)) for edge in edges})
    for a, b in pairs:
        if a == b or a < 0 or b >= size:
            raise HpcsgdError(
                f"edge ({a}, {b}) is invalid", expected=f"two different peers of 0 to {size - 1}"
            )
    matrix = np.zeros((size, size))
    if pairs:
        a, b = np.array(pairs).T
        degree = np.bincount(np.concatenate([a, b]), minlength=size)
        matrix[a, b] = matrix[b, a] = 1 / (1 + np.maximum(degree[a], degree[b]))
    np.fill_diagonal(matrix, 1 - matrix.sum(axis=1))
    return matrix


def metropolis_among(
    near: Sequence[Sequence[int]], members: Sequence[int]
) -> dict[int, list[tuple[int, float]]]:
    """Return the rows of `metropolis` for the edges between some peers.

    Parameters
    ----------
    near
        The neighbours of every peer.
    members
        The peers that exchange their models.

    Returns
    -------
    dict
        For each member its (other, weight) pairs, itself included, ascending by other.
    """
    inside = set(members)
    neighbours = {peer: [other for other in near[peer] if other in inside] for peer in members}
    rows = {}
    for peer, others in neighbours.items():
        row = {other: 1 / (1 + max(len(others), len(neighbours[other]))) for other in others}
        row[peer] = 1 - sum(row.values())
        rows[peer] = sorted(row.items())
    return rows


def check_mixing_matrix(matrix: Matrix, size: int, directed: bool, name: str) -> None:
    """Raise unless a matrix is a mixing matrix: doubly stochastic, and symmetric unless directed.

    Parameters
    ----------
    matrix
        Float64, shape (size, size).
    size
        Number of peers.
    directed
        Whether W_ij may differ from W_ji.
    name
        Name of the topology, for the error.

    Raises
    ------
    HpcsgdError
        The shape is wrong, a weight is negative or NaN, a row or column does not sum to 1, or W_ij differs
        from W_ji.
    """
    if matrix.shape != (size, size):
        raise HpcsgdError(
            f"{name}: the mixing matrix W has a wrong shape", expected=(size, size), got=matrix.shape
        )
    for i, j in np.argwhere(~(matrix >= 0))[:1]:
        raise HpcsgdError(
            f"{name}: weight W[{i}, {j}] is negative or NaN", expected="at least 0", got=matrix[i, j]
        )
    for axis, line in ((1, "row"), (0, "column")):
        sums = matrix.sum(axis=axis)
        for index in np.flatnonzero(~(np.abs(sums - 1) <= TOLERANCE))[:1]:
            do = "return a doubly stochastic W: otherwise mixing changes the mean of the models"
            raise HpcsgdError(
                f"{name}: sum of {line} {index} of the mixing matrix W", expected=1, got=sums[index], do=do
            )
    for i, j in np.argwhere(np.abs(matrix - matrix.T) > TOLERANCE)[: 0 if directed else 1]:
        do = "return a symmetric W, or set directed = True"
        raise HpcsgdError(
            f"{name}: W[{i}, {j}] differs from W[{j}, {i}]",
            expected=f"{matrix[j, i]}",
            got=matrix[i, j],
            do=do,
        )


def unreachable(matrices: Sequence[Matrix]) -> list[int]:
    """Return the peers without a path from peer 0 over all the mixing matrices together.

    In a doubly stochastic matrix a peer that is reachable in one direction is reachable in both.
    """
    linked = reduce(np.add, matrices) > 0
    seen = np.zeros(len(linked), bool)
    new = seen.copy()
    new[0] = True
    while new.any():
        seen |= new
        new = linked[new].any(axis=0) & ~seen
    return [int(peer) for peer in np.flatnonzero(~seen)]
