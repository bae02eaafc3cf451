"""Iterations of peers whose gradients take drawn times: the same ones on every rank, without a message."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcsgd.strategies.backup_workers.closing_rule import Rounds
from hpcsgd.strategies.delays import Delays


class VirtualTime:
    """Tells which peers take part in each iteration, on a clock that only the gradients' times move.

    Whoever takes part in an iteration begins its next gradient at the instant at which that one closed;
    averaging takes no time. What ends at the same instant is announced together.

    Parameters
    ----------
    rounds
        The rule.
    delays
        How long each gradient takes.

    Attributes
    ----------
    seconds
        When the last iteration closed.
    """

    def __init__(self, rounds: Rounds, delays: Delays) -> None:
        self.rounds, self._delays = rounds, delays
        self.seconds = 0.0
        self._numbers = [0] * rounds.size
        self._ends = np.array([delays.draw(peer, 0) for peer in range(rounds.size)])

    def next(self) -> list[int]:
        """Let time pass until the open iteration closes; the peers that take part in it."""
        closing = self.rounds.iteration + 1
        while self.rounds.iteration < closing:
            now = float(self._ends.min())
            peers = np.flatnonzero(self._ends == now).tolist()
            self._ends[peers] = np.inf
            self.rounds.announce(peers, closing)
        self.seconds = now
        members = self.rounds.members(peers[0])
        for peer in members:
            self._numbers[peer] += 1
            self._ends[peer] = now + self._delays.draw(peer, self._numbers[peer])
        return members

    def close(self) -> None:
        """There is nothing to finish."""

    def state_dict(self) -> dict[str, Any]:
        """At the end of an iteration: the clock, and what is under way."""
        clock = {"seconds": self.seconds, "numbers": list(self._numbers), "ends": self._ends.tolist()}
        return {**self.rounds.state_dict(), **clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.rounds.load_state_dict(state)
        self.seconds, self._numbers = float(state["seconds"]), list(state["numbers"])
        self._ends = np.array(state["ends"])
