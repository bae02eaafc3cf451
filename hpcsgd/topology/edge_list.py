"""A graph from a file with its edges."""

from __future__ import annotations

from pathlib import Path

from hpcsgd.errors import BadOption
from hpcsgd.registry import checked
from hpcsgd.topology.base import Graph
from hpcsgd.topology.mixing import Edge


class EdgeList(Graph):
    """The undirected graph of an edge list.

    Parameters
    ----------
    size
        Number of peers, which are numbered from 0 in the file.
    path
        A text file with an edge on each line: two peers, separated by a space; # starts a comment.

    Raises
    ------
    BadOption
        The file cannot be read, or a line is not two different peers.
    HpcsgdError
        The graph is not connected (on first use).
    """

    @checked
    def __init__(self, size: int, path: Path) -> None:
        super().__init__(size)
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            expected = "a text file with two peers on each line, such as: 0 1"
            raise BadOption(f"cannot read edge list {path}", expected=expected, got=error) from error
        self._edges = []
        for number, line in enumerate(lines, 1):
            if text := line.partition("#")[0].strip():
                self._edges.append(_parse_edge(text, size, f"{path}, line {number}"))

    def edges_at(self, step: int) -> list[Edge]:
        """Return the edges of the file."""
        return self._edges


def _parse_edge(text: str, size: int, where: str) -> Edge:
    expected = f"two different peers of 0 to {size - 1}, separated by a space"
    try:
        a, b = map(int, text.split())
    except ValueError:
        raise BadOption(f"{where}: not an edge", expected=expected, got=repr(text)) from None
    if a == b or not (0 <= a < size and 0 <= b < size):
        do = f"use {max(a, b) + 1} peers" if min(a, b) >= 0 and a != b else None
        raise BadOption(f"{where}: no such edge", expected=expected, got=repr(text), do=do)
    return a, b
