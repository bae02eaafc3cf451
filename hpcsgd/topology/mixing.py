"""Metropolis-Hastings weights of a graph, and what a mixing matrix must satisfy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from hpcsgd.errors import HpcsgdError

Matrix = NDArray[np.float64]
Link = tuple[int, int]

#: A sum of weights, or a product of mixing matrices, this near to its value has it.
TOLERANCE = 1e-12


def metropolis(size: int, links: Iterable[Link]) -> Matrix:
    """Metropolis-Hastings weights: W_ij = 1 / (1 + max(deg_i, deg_j)) on each link, W_ii takes the rest.

    Parameters
    ----------
    size
        Peers.
    links
        Pairs of peers that exchange their models, in any order; a pair given twice counts once.

    Returns
    -------
    ndarray, float64, shape (size, size)
        Symmetric and doubly stochastic, with a positive diagonal.

    Raises
    ------
    HpcsgdError
        A link from a peer to itself, or to one that does not exist.
    """
    pairs = sorted({(min(link), max(link)) for link in links})
    for a, b in pairs:
        if a == b or a < 0 or b >= size:
            raise HpcsgdError(
                f"no link can join {a} and {b}", expected=f"two different peers of 0 to {size - 1}"
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
    """The rows of `metropolis` for the links between some peers: for each of these (other, weight) pairs.

    Parameters
    ----------
    near
        The neighbours of each of all peers.
    members
        Those that exchange their models, each of which counts itself too; ascending by other.
    """
    inside = set(members)
    met = {peer: [other for other in near[peer] if other in inside] for peer in members}
    rows = {}
    for peer, others in met.items():
        row = {other: 1 / (1 + max(len(others), len(met[other]))) for other in others}
        row[peer] = 1 - sum(row.values())
        rows[peer] = sorted(row.items())
    return rows


def check(matrix: Matrix, size: int, directed: bool, name: str) -> None:
    """Raise unless a matrix is a mixing matrix: doubly stochastic, and symmetric unless directed.

    Parameters
    ----------
    matrix
        Float64, shape (size, size).
    size
        Peers.
    directed
        Whether W_ij may differ from W_ji.
    name
        What has this matrix, for the error.

    Raises
    ------
    HpcsgdError
        Wrong shape, a negative weight or one that is no number, a row or column whose sum is not 1, or
        W_ij other than W_ji.
    """
    if matrix.shape != (size, size):
        raise HpcsgdError(f"{name}: wrong shape", expected=(size, size), got=matrix.shape)
    for i, j in np.argwhere(~(matrix >= 0))[:1]:
        raise HpcsgdError(f"{name}: weight W[{i}, {j}]", expected="at least 0", got=matrix[i, j])
    for axis, line in ((1, "row"), (0, "column")):
        sums = matrix.sum(axis=axis)
        for index in np.flatnonzero(~(np.abs(sums - 1) <= TOLERANCE))[:1]:
            do = "give W doubly stochastic: otherwise mixing moves the mean of the models"
            raise HpcsgdError(f"{name}: sum of {line} {index}", expected=1, got=sums[index], do=do)
    for i, j in np.argwhere(np.abs(matrix - matrix.T) > TOLERANCE)[: 0 if directed else 1]:
        do = "give W symmetric, or set directed = True"
        raise HpcsgdError(f"{name}: W[{i}, {j}]", expected=f"{matrix[j, i]}", got=matrix[i, j], do=do)


def unreached(matrices: Sequence[Matrix]) -> list[int]:
    """The peers that peer 0 cannot reach over some mixing matrices, taken together.

    In a doubly stochastic matrix who can be reached in one direction can be reached in both.
    """
    joined = reduce(np.add, matrices) > 0
    seen = np.zeros(len(joined), bool)
    new = seen.copy()
    new[0] = True
    while new.any():
        seen |= new
        new = joined[new].any(axis=0) & ~seen
    return [int(peer) for peer in np.flatnonzero(~seen)]
