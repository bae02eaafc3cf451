"""Connectivity, spanning trees and Hamiltonian paths of undirected graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Edge = tuple[int, int]
Adjacency = list[list[int]]

#: Vertices visited by the searches for a Hamiltonian path, one from each vertex, before they give up.
_VISIT_LIMIT = 20_000


def adjacency(size: int, edges: Iterable[Edge]) -> Adjacency:
    """Return the neighbours of each vertex, ascending."""
    sets: list[set[int]] = [set() for _ in range(size)]
    for a, b in edges:
        sets[a].add(b)
        sets[b].add(a)
    return [sorted(near) for near in sets]


def breadth_first_tree(near: Adjacency) -> list[Edge]:
    """Return the edges of a breadth-first search from vertex 0, each in the direction of the search."""
    seen, queue, found = {0}, [0], []
    for a in queue:
        for b in near[a]:
            if b not in seen:
                seen.add(b)
                queue.append(b)
                found.append((a, b))
    return found


def is_connected(size: int, edges: Iterable[Edge]) -> bool:
    """Return whether the graph is connected."""
    return len(breadth_first_tree(adjacency(size, edges))) == size - 1


def spanning(size: int, edges: Sequence[Edge]) -> list[Edge]:
    """Return the edges (a, b), a < b, of a Hamiltonian path if a bounded search finds one, else of a tree."""
    near = adjacency(size, edges)
    path = hamiltonian_path(near)
    return [(min(edge), max(edge)) for edge in (breadth_first_tree(near) if path is None else pairwise(path))]


def hamiltonian_path(near: Adjacency) -> list[int] | None:
    """Return a path through all vertices: 0, 1, 2, ... if it exists, else the result of a bounded search."""
    if all(b in near[a] for a, b in pairwise(range(len(near)))):
        return list(range(len(near)))
    if sum(len(neighbours) == 1 for neighbours in near) > 2:
        return None  # each of these vertices would have to be an end of the path
    starts = sorted(range(len(near)), key=lambda vertex: len(near[vertex]))
    visits_left = _VISIT_LIMIT // len(near) + len(near)
    return next((path for start in starts if (path := _path_from(start, near, visits_left))), None)


def _path_from(start: int, near: Adjacency, visits_left: int) -> list[int] | None:
    """Search depth-first within a limit: another start is more promising than a long search."""
    path, seen = [start], {start}
    candidates = [_unvisited(start, near, seen)]
    while candidates and visits_left:
        if len(path) == len(near):
            return path
        vertex = next(candidates[-1], None)
        if vertex is None:
            candidates.pop()
            seen.discard(path.pop())
            continue
        visits_left -= 1
        path.append(vertex)
        seen.add(vertex)
        candidates.append(_unvisited(vertex, near, seen))
    return None


def _unvisited(vertex: int, near: Adjacency, seen: set[int]) -> Iterator[int]:
    """Return unvisited neighbours, those with the fewest unvisited neighbours first (Warnsdorff's rule)."""
    onward = {b: sum(c not in seen for c in near[b]) for b in near[vertex] if b not in seen}
    return iter(sorted(onward, key=lambda b: (onward[b], b)))
