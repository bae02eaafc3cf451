"""Reach, spanning trees and Hamiltonian paths of undirected graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

Link = tuple[int, int]
Adjacency = list[list[int]]

#: Vertices that the searches for a Hamiltonian path, one from each, visit before they give up.
_PATIENCE = 20_000


def adjacency(size: int, links: Iterable[Link]) -> Adjacency:
    """The neighbours of each vertex, ascending."""
    sets: list[set[int]] = [set() for _ in range(size)]
    for a, b in links:
        sets[a].add(b)
        sets[b].add(a)
    return [sorted(near) for near in sets]


def tree(near: Adjacency) -> list[Link]:
    """The edges of a breadth-first search from vertex 0, each from where the search came."""
    seen, queue, found = {0}, [0], []
    for a in queue:
        for b in near[a]:
            if b not in seen:
                seen.add(b)
                queue.append(b)
                found.append((a, b))
    return found


def connected(size: int, links: Iterable[Link]) -> bool:
    """Whether links join all vertices."""
    return len(tree(adjacency(size, links))) == size - 1


def spanning(size: int, links: Sequence[Link]) -> list[Link]:
    """The edges (a, b), a < b, of a Hamiltonian path if a bounded search finds one, else of a tree."""
    near = adjacency(size, links)
    path = hamiltonian_path(near)
    return [(min(link), max(link)) for link in (tree(near) if path is None else pairwise(path))]


def hamiltonian_path(near: Adjacency) -> list[int] | None:
    """A path through all vertices: 0, 1, 2, ... where it exists, else what a bounded search finds."""
    if all(b in near[a] for a, b in pairwise(range(len(near)))):
        return list(range(len(near)))
    if sum(len(neighbours) == 1 for neighbours in near) > 2:
        return None  # each such vertex would have to be an end
    starts = sorted(range(len(near)), key=lambda vertex: len(near[vertex]))
    patience = _PATIENCE // len(near) + len(near)
    return next((path for start in starts if (path := _path_from(start, near, patience))), None)


def _path_from(start: int, near: Adjacency, patience: int) -> list[int] | None:
    """A depth-first search; a fresh start is worth more than patience with a bad one."""
    path, seen = [start], {start}
    open_ends = [_nexts(start, near, seen)]
    while open_ends and patience:
        if len(path) == len(near):
            return path
        vertex = next(open_ends[-1], None)
        if vertex is None:
            open_ends.pop()
            seen.discard(path.pop())
            continue
        patience -= 1
        path.append(vertex)
        seen.add(vertex)
        open_ends.append(_nexts(vertex, near, seen))
    return None


def _nexts(vertex: int, near: Adjacency, seen: set[int]) -> Iterator[int]:
    """Where to go next, the one with the fewest ways on first (Warnsdorff's rule)."""
    ways = {b: sum(c not in seen for c in near[b]) for b in near[vertex] if b not in seen}
    return iter(sorted(ways, key=lambda b: (ways[b], b)))
