"""Iterations in virtual time: their participants follow from simulated delays, without any message."""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcsgd.strategies.backup_workers.closing_rule import IterationCloser
from hpcsgd.strategies.delays import Delays


class VirtualTime:
    """Discrete-event simulation that yields the participants of each iteration.

    Participants of an iteration begin their next gradients at the instant at which it closes; averaging
    takes no time. Gradients that end at the same instant are marked as done together.

    Parameters
    ----------
    closer
        The rule that closes iterations.
    delays
        Time of each gradient.

    Attributes
    ----------
    seconds
        Virtual time at which the last iteration closed.
    """

    def __init__(self, closer: IterationCloser, delays: Delays) -> None:
        self.closer, self._delays = closer, delays
        self.seconds = 0.0
        self._numbers = [0] * closer.size
        self._ends = np.array([delays.sample(peer, 0) for peer in range(closer.size)])

    def next(self) -> list[int]:
        """Advance the clock until the open iteration closes; return its participants."""
        closing = self.closer.iteration + 1
        while self.closer.iteration < closing:
            now = float(self._ends.min())
            peers = np.flatnonzero(self._ends == now).tolist()
            self._ends[peers] = np.inf
            self.closer.mark_done(peers, closing)
        self.seconds = now
        participants = self.closer.participants(peers[0])
        for peer in participants:
            self._numbers[peer] += 1
            self._ends[peer] = now + self._delays.sample(peer, self._numbers[peer])
        return participants

    def close(self) -> None:
        """Do nothing: there is no communication to finish."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state at the end of an iteration: closer, clock, and the gradients being computed."""
        clock = {"seconds": self.seconds, "numbers": list(self._numbers), "ends": self._ends.tolist()}
        return {**self.closer.state_dict(), **clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.closer.load_state_dict(state)
        self.seconds, self._numbers = float(state["seconds"]), list(state["numbers"])
        self._ends = np.array(state["ends"])
