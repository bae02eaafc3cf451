"""Which peers take part in which iteration, where nobody waits for the slowest: the rules, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcsgd.errors import BadOption

Words = np.ndarray  # int32


class Rounds:
    """The open iteration, who is done with it, and who took part in those before.

    A peer announces that its gradient is done and then waits until the iteration closes, with all that
    are done by then: its done-set. So at a closing nobody's announcement is left over, and a peer has one
    announcement outstanding at most; whom it closed with is kept until its next one, however late it looks.

    Two rules of closing. Dynamic, DTUR (Xiong et al., arXiv 2102.06280): once both ends of an edge are
    done that this epoch has not used; all such edges inside the done-set are then used, and when none is
    left the next epoch begins with all of them. Fixed: once all but `backups` peers are done.

    Parameters
    ----------
    size
        Peers.
    edges
        Pairs of peers that join all of them, of which every epoch uses each.
    backups
        For how many peers an iteration does not wait; None: dynamic.
    memory
        int32, `words(size, edges)` of them, which all who use the same rounds share, one at a time; zero
        at first and yet to `begin`. Default: memory of its own.
    """

    def __init__(
        self,
        size: int,
        edges: Sequence[tuple[int, int]],
        backups: int | None,
        memory: Words | None = None,
    ) -> None:
        self.size, self.backups = size, backups
        self._ends = np.array(edges, np.int64).reshape(-1, 2).T
        own = memory is None
        memory = np.zeros(words(size, edges), np.int32) if memory is None else memory
        bounds = np.cumsum([1, size, len(edges), size * size])
        self._iteration, self._done, self._unused, sets = np.split(memory[: bounds[-1]], bounds[:-1])
        self._sets = sets.reshape(size, size)
        if own:
            self.begin()

    def begin(self, iteration: int = 0, unused: Sequence[int] = ()) -> None:
        """Open an iteration, with nobody done; `unused` are the edges to use, all where none is left."""
        self._iteration[0], self._done[:], self._unused[:] = iteration, 0, 0
        self._unused[list(unused) or slice(None)] = 1

    @property
    def iteration(self) -> int:
        """The open one."""
        return int(self._iteration[0])

    @property
    def unused(self) -> list[int]:
        """The numbers of the edges that this epoch has still to use."""
        return np.flatnonzero(self._unused).tolist()

    @property
    def awaited(self) -> list[int]:
        """The peers that are not done."""
        return np.flatnonzero(self._done == 0).tolist()

    def members(self, peer: int) -> list[int]:
        """The done-set of the last closed iteration that a peer took part in."""
        return np.flatnonzero(self._sets[peer]).tolist()

    def announce(self, peers: Sequence[int], end: int) -> int | None:
        """Some peers are done, at one instant: in which iteration they take part; None: `end` is reached."""
        if self.iteration >= end:
            return None
        entered = self.iteration
        self._done[peers] = 1
        used = self._done[self._ends].all(axis=0)
        if self._closes(used & (self._unused == 1)):
            self._sets[self._done == 1] = self._done
            self._unused[used] = 0
            self.begin(entered + 1, self.unused)
        return entered

    def state_dict(self) -> dict[str, Any]:
        """Where an iteration has just closed."""
        return {"iteration": self.iteration, "unused": self.unused}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.begin(state["iteration"], state["unused"])

    def _closes(self, newly_used: np.ndarray) -> bool:
        if self.backups is None:
            return bool(newly_used.any()) or self.size == 1
        return int(self._done.sum()) >= self.size - self.backups


def words(size: int, edges: Sequence[tuple[int, int]]) -> int:
    """How much memory `Rounds` needs, in int32."""
    return 1 + size + len(edges) + size * size


def fixed_backups(backups: str | int, size: int) -> int | None:
    """How many backup workers there are of `size` peers; None for "dynamic".

    Raises
    ------
    BadOption
        Not a number of peers that leaves two to average; one peer alone may have any.
    """
    if backups == "dynamic":
        return None
    if isinstance(backups, int) and (0 <= backups <= size - 2 or size == 1):
        return backups
    expected = f"dynamic, or 0 to {size - 2}, so that two of {size} peers meet"
    raise BadOption("number of backup workers", expected=expected, got=backups, everywhere=True)
