"""What steps and rounds of averaging were like on this rank: totals for the metrics, and what they take."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

_REMEMBERED = 9  # steps whose median is what a step takes: the first ones are slow, and any may be


@dataclass
class Totals:
    """What rounds were like, of this rank.

    Attributes
    ----------
    rounds, steps
        How many there were.
    merges, lag, longest_lag
        How many averages were merged, and how many steps these were behind, in all and at most.
    seconds, waited
        What rounds took, and how long the training waited for them.
    drift
        The consensus distances that averages found, added up.
    """

    rounds: int = 0
    steps: int = 0
    merges: int = 0
    lag: int = 0
    longest_lag: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    drift: float = 0.0


class Tally:
    """Counts and clocks of one rank.

    Attributes
    ----------
    totals
        See `Totals`.
    squares, norm
        Of the last round: the squares of the snapshot's distance from the average, and of its norm.
    step_seconds, round_seconds
        What a step takes, as the median of the last few, and what the last round took.
    """

    def __init__(self) -> None:
        self.totals, self._told = Totals(), Totals()
        self.squares = self.norm = self.step_seconds = self.round_seconds = 0.0
        self._round_cost = self._merge_cost = 0.0
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self._step_began = self._round_began = self._cost_before = 0.0

    @property
    def round_cost(self) -> float:
        """Seconds of a core that the last round took, its merge included."""
        return self._round_cost + self._merge_cost

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._step_began = time.perf_counter()

    def end_step(self) -> None:
        """Note that it is over."""
        self._durations.append(time.perf_counter() - self._step_began)
        self.step_seconds = statistics.median(self._durations)

    def begin_round(self) -> None:
        """Start the clocks of a round; in the communication thread."""
        self._round_began, self._cost_before = time.perf_counter(), time.thread_time()

    def end_round(self, squares: float, norm: float) -> None:
        """Note that it is over."""
        self.squares, self.norm = squares, norm
        self.round_seconds = time.perf_counter() - self._round_began
        self._round_cost = time.thread_time() - self._cost_before
        self.totals.seconds += self.round_seconds
        self.totals.rounds += 1  # last: the others may now start the next

    @contextmanager
    def merging(self, lag: int) -> Iterator[None]:
        """Inside, an average is merged that is so many steps behind."""
        started, totals = time.perf_counter(), self.totals
        yield
        self._merge_cost = time.perf_counter() - started
        totals.merges += 1
        totals.lag += lag
        totals.longest_lag = max(totals.longest_lag, lag)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the training waits for a round."""
        started = time.perf_counter()
        yield
        self.totals.waited += time.perf_counter() - started

    def figures(self) -> dict[str, float]:
        """What rounds were like since the last call.

        Returns
        -------
        dict
            "rounds"; "steps_per_round"; "lag" and "longest_lag" (of all), the steps between a snapshot and
            its merge; "hidden", the share of the rounds' time for which the training did not wait;
            "drift", the mean consensus distance of the snapshots.
        """
        now, before = self.totals, self._told
        self._told = replace(now)
        rounds, seconds = now.rounds - before.rounds, now.seconds - before.seconds
        return {
            "rounds": rounds,
            "steps_per_round": (now.steps - before.steps) / max(1, rounds),
            "lag": (now.lag - before.lag) / max(1, now.merges - before.merges),
            "longest_lag": now.longest_lag,
            "hidden": 1.0 - min(1.0, (now.waited - before.waited) / seconds) if seconds else 1.0,
            "drift": (now.drift - before.drift) / max(1, rounds),
        }

    def state_dict(self) -> dict[str, Any]:
        """The totals; what steps take is measured anew."""
        return {"totals": asdict(self.totals), "told": asdict(self._told)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.totals, self._told = (Totals(**state[name]) for name in ("totals", "told"))
