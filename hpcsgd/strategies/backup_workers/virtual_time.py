"""Iterations in virtual time: their participants follow from simulated delays, without any message."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hpcsgd.strategies.backup_workers.closing_rule import IterationCloser
from hpcsgd.strategies.context import StrategyContext
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
        self._pending: list[int] = []  # local participants that have not taken their step yet
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

    def schedule(self, context: StrategyContext, end: int) -> Iterator[int]:
        """Yield the local peer of each next step, until iteration `end`."""
        while context.step < end:
            self._participants = self.next()
            self._pending = [peer for peer in self._participants if peer in context.peers.local]
            if not self._pending:
                context.step += 1
            while self._pending:
                yield context.peers.index(self._pending[0])

    def end_step(self, context: StrategyContext, end: int) -> tuple[int, list[int]] | None:
        """Return the iteration and its participants, if all local ones have taken their step."""
        self._pending.pop(0)
        return None if self._pending else (context.step, self._participants)

    def close(self) -> None:
        """Do nothing: there is no communication to finish."""

    abandon = close

    def state_dict(self) -> dict[str, Any]:
        """Return the state at the end of an iteration: closer, clock, and the gradients being computed."""
        clock = {"seconds": self.seconds, "numbers": list(self._numbers), "ends": self._ends.tolist()}
        return {**self.closer.state_dict(), **clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.closer.load_state_dict(state)
        self.seconds, self._numbers = float(state["seconds"]), list(state["numbers"])
        self._ends = np.array(state["ends"])
