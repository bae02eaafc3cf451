"""Statistics of this rank's steps and averaging rounds: totals for the metrics, and measured times."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

_WINDOW = 9  # steps whose median is the step time: the first ones are slow, and any other may be


@dataclass
class RoundTotals:
    """Totals of this rank since the start."""

    #: Completed rounds, and steps.
    rounds: int = 0
    steps: int = 0
    #: Merged averages, and the steps from snapshot to merge: their sum, and their maximum.
    merges: int = 0
    lag: int = 0
    longest_lag: int = 0
    #: Duration of all rounds, and the time for which the training waited for them.
    seconds: float = 0.0
    waited: float = 0.0
    drift: float = 0.0  # sum of the consensus distances of the snapshots


class RoundStatistics:
    """Totals and clocks of one rank.

    Attributes
    ----------
    totals
        The totals, see `RoundTotals`.
    squared_distance, squared_norm
        Squared 2-norms of the last round: of average - snapshot, and of the average.
    step_seconds, round_seconds
        Median duration of the last steps, and duration of the last round.
    """

    def __init__(self) -> None:
        self.totals, self._reported = RoundTotals(), RoundTotals()
        self.squared_distance = self.squared_norm = self.step_seconds = self.round_seconds = 0.0
        self._round_cpu = self._merge_seconds = 0.0
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._step_start = self._round_start = self._cpu_before = 0.0

    @property
    def round_cpu_seconds(self) -> float:
        """CPU time of the last round and its merge, in seconds."""
        return self._round_cpu + self._merge_seconds

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._step_start = time.perf_counter()

    def end_step(self) -> None:
        """Record the duration of the step."""
        self._durations.append(time.perf_counter() - self._step_start)
        self.step_seconds = statistics.median(self._durations)

    def begin_round(self) -> None:
        """Start the clocks of a round; called in the communication thread."""
        self._round_start, self._cpu_before = time.perf_counter(), time.thread_time()

    def end_round(self, squared_distance: float, squared_norm: float) -> None:
        """Record the result and the durations of the round."""
        self.squared_distance, self.squared_norm = squared_distance, squared_norm
        self.round_seconds = time.perf_counter() - self._round_start
        self._round_cpu = time.thread_time() - self._cpu_before
        self.totals.seconds += self.round_seconds
        self.totals.rounds += 1  # last: other ranks may start the next round now

    @contextmanager
    def merging(self, lag: int) -> Iterator[None]:
        """Context manager for the merge of an average whose snapshot is `lag` steps old."""
        started, totals = time.perf_counter(), self.totals
        yield
        self._merge_seconds = time.perf_counter() - started
        totals.merges += 1
        totals.lag += lag
        totals.longest_lag = max(totals.longest_lag, lag)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager for a wait of the training for a round."""
        started = time.perf_counter()
        yield
        self.totals.waited += time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """Return the statistics of the rounds since the last call.

        Returns
        -------
        dict
            "rounds"; "steps_per_round"; "lag", the mean of the steps from a snapshot to its merge, and
            "longest_lag", their maximum since the start; "hidden", the share of the rounds' time for which
            the training did not wait; "drift", the mean consensus distance of the snapshots.
        """
        now, before = self.totals, self._reported
        self._reported = replace(now)
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
        """Return the totals; durations are measured again."""
        return {"totals": asdict(self.totals), "told": asdict(self._reported)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.totals, self._reported = (RoundTotals(**state[name]) for name in ("totals", "told"))
