"""The rule that closes an iteration of backup workers, and the peers that take part in each. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcsgd.errors import BadOption

Words = np.ndarray  # int32


class IterationCloser:
    """State of the open iteration, and the participants of earlier ones.

    A peer whose gradient is done is marked as done and then waits until the iteration closes; all peers
    that are done at that instant are its participants. So no mark outlives a closing, and the participants
    of a peer's last iteration stay readable until the peer is marked again.

    There are two rules. Dynamic, DTUR (Xiong et al., arXiv 2102.06280): an iteration closes once both ends
    of an edge are done that is still unused in the current epoch; all edges between participants are then
    used, and when none is left the next epoch begins with all of them. Fixed: an iteration closes once all
    peers but `backups` are done.

    Parameters
    ----------
    size
        Number of peers.
    edges
        Pairs of peers that form a connected graph; every epoch uses each of them.
    backups
        Number of peers for which an iteration does not wait; None: the dynamic rule.
    memory
        int32 of shape (`words_needed(size, edges)`,), zero, shared by all ranks that use the same iterations;
        access must be exclusive, and one rank must call `open`. Default: memory of its own, open already.
    """

    def __init__(
        self,
        size: int,
        edges: Sequence[tuple[int, int]],
        backups: int | None,
        memory: Words | None = None,
    ) -> None:
        self.size, self.backups = size, backups
        self._endpoints = np.array(edges, np.int64).reshape(-1, 2).T
        is_private = memory is None
        memory = np.zeros(words_needed(size, edges), np.int32) if memory is None else memory
        bounds = np.cumsum([1, size, len(edges), size * size])
        self._iteration, self._done, self._unused, participants = np.split(memory[: bounds[-1]], bounds[:-1])
        self._participants = participants.reshape(size, size)
        if is_private:
            self.open()

    def open(self, iteration: int = 0, unused: Sequence[int] = ()) -> None:
        """Open an iteration in which no peer is done yet.

        Parameters
        ----------
        iteration
            Its number. Default 0.
        unused
            Numbers of the edges that the epoch has still to use. Default, and if empty: all.
        """
        self._iteration[0], self._done[:], self._unused[:] = iteration, 0, 0
        self._unused[list(unused) or slice(None)] = 1

    @property
    def iteration(self) -> int:
        """Number of the open iteration."""
        return int(self._iteration[0])

    @property
    def unused_edges(self) -> list[int]:
        """Numbers of the edges that the current epoch has still to use."""
        return np.flatnonzero(self._unused).tolist()

    @property
    def awaited(self) -> list[int]:
        """The peers that are not done in the open iteration."""
        return np.flatnonzero(self._done == 0).tolist()

    def participants(self, peer: int) -> list[int]:
        """Return the participants of the last closed iteration in which a peer took part."""
        return np.flatnonzero(self._participants[peer]).tolist()

    def mark_done(self, peers: Sequence[int], end: int) -> int | None:
        """Mark peers as done at the same instant, and close the iteration if the rule allows.

        Returns
        -------
        int or None
            The iteration in which the peers take part; None if iteration `end` is reached: not marked.
        """
        if self.iteration >= end:
            return None
        entered = self.iteration
        self._done[peers] = 1
        used = self._done[self._endpoints].all(axis=0)
        if self._closes(used & (self._unused == 1)):
            self._participants[self._done == 1] = self._done
            self._unused[used] = 0
            self.open(entered + 1, self.unused_edges)
        return entered

    def state_dict(self) -> dict[str, Any]:
        """Return the state; valid when an iteration has just been opened."""
        return {"iteration": self.iteration, "unused": self.unused_edges}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.open(state["iteration"], state["unused"])

    def _closes(self, newly_used: np.ndarray) -> bool:
        if self.backups is None:
            return bool(newly_used.any()) or self.size == 1
        return int(self._done.sum()) >= self.size - self.backups


def words_needed(size: int, edges: Sequence[tuple[int, int]]) -> int:
    """Return the size of the memory of an `IterationCloser`, in int32 words."""
    return 1 + size + len(edges) + size * size


def fixed_backups(backups: str | int, size: int) -> int | None:
    """Return the number of backup workers among `size` peers, or None for "dynamic".

    Raises
    ------
    BadOption
        Neither "dynamic" nor a number that leaves two peers to average; a single peer may have any number.
    """
    if backups == "dynamic":
        return None
    if isinstance(backups, int) and (0 <= backups <= size - 2 or size == 1):
        return backups
    raise BadOption(
        "option backups is out of range",
        expected=f"dynamic, or 0 to {size - 2}: at least two of the {size} peers must average",
        got=backups,
        do="set backups=dynamic or to one of these numbers, or start more ranks",
        everywhere=True,
    )
