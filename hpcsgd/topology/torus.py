"""The torus."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Annotated

from hpcsgd.errors import BadOption
from hpcsgd.registry import Within, checked
from hpcsgd.topology.base import Graph, Point
from hpcsgd.topology.mixing import Edge


class Torus(Graph):
    """A grid with wrap-around: each peer mixes with its four neighbours.

    Parameters
    ----------
    size
        Number of peers; peer `columns * row + column` is at (row, column).
    rows
        Rows of the grid, a divisor of `size`. 0 (default): as close to a square as the factors of `size`
        allow; one row, a ring, if it is prime.

    Raises
    ------
    BadOption
        `rows` does not divide `size`.
    """

    @checked
    def __init__(self, size: int, rows: Annotated[int, Within(0, 10_000)] = 0) -> None:
        super().__init__(size)
        sides = [side for side in range(1, size + 1) if size % side == 0]
        if rows and rows not in sides:
            expected = f"one of {', '.join(map(str, sides))}, or 0 to choose one"
            raise BadOption(f"option rows does not divide the {size} peers", expected=expected, got=rows)
        self.rows = rows or max(side for side in sides if side <= isqrt(size))
        self.columns = size // self.rows

    def edges_at(self, step: int) -> Iterator[Edge]:
        """Return the edges to the right and down, if they lead to another peer."""
        for peer in range(self.size):
            row, column = divmod(peer, self.columns)
            right = row * self.columns + (column + 1) % self.columns
            down = (row + 1) % self.rows * self.columns + column
            yield from ((peer, other) for other in (right, down) if other != peer)

    def layout(self) -> list[Point]:
        """Return the positions in the grid, peer 0 at the top left."""
        positions = (divmod(peer, self.columns) for peer in range(self.size))
        return [(float(column), float(-row)) for row, column in positions]
