"""Averaging rounds of LASGD beside the training steps: their start, and their end on all ranks alike."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from hpcsgd.collectives.staging import record_event, side_stream, wait_for
from hpcsgd.errors import rank_left
from hpcsgd.mpi.world import World
from hpcsgd.strategies.lasgd.heartbeat import ControlAllgather
from hpcsgd.strategies.lasgd.model_delta import ModelDelta
from hpcsgd.strategies.lasgd.statistics import RoundStatistics

#: The control record that each rank contributes to the all-gather.
RECORD = np.dtype(
    [
        ("steps", np.int64),  # completed
        ("steps_begun", np.int64),
        ("steps_since_snapshot", np.int64),
        ("quiescing", np.bool_),  # takes no steps until all ranks quiesce
        ("rounds", np.int64),  # completed
        ("squared_distance", np.float64),  # of the last snapshot from its average
        ("squared_norm", np.float64),  # of that average
        ("step_seconds", np.float64),
        ("round_seconds", np.float64),
        ("round_cpu_seconds", np.float64),
    ]
)
Records = Any  # a record array of RECORD, of shape (ranks,)

#: Seconds between two all-gathers: this share of the time until the next event, or of a step if longer.
_SHARE, _SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 1e-3, 0.2
_SHARE_QUIESCING = 0.06  # of a step, while a rank waits for the others to quiesce
#: Step times vary: a rank leaves a step to others only if it would be later by more than this factor.
_LATE = 1.5
_ROUND = "a round of averaging"


class Averaging:
    """This rank's side of rounds that start when they are due on all ranks; collective when made.

    All decisions follow from the all-gathered control records, so every rank starts the same rounds in the
    same order and detects the same instant at which all have quiesced: no other agreement is needed,
    whichever rank finishes first. The rounds are jobs of the communication thread.

    Parameters
    ----------
    world
        The ranks.
    delta
        Snapshot, average and correction of this rank's model.
    steps_until_round
        Function of the records of all ranks: steps until the next round is due; 0: start one now.
    damping
        Function of the records of all ranks: the share of the result that a merge applies, see
        `ModelDelta.accumulate`.
    max_lag
        Steps after a merge, or after the snapshot of a correction that is not merged yet, that this rank
        takes before it waits for the next merge; None: any number.
    target
        Returns the number of steps that all ranks together begin before they quiesce.

    Attributes
    ----------
    statistics
        Statistics of this rank's steps and rounds.
    """

    def __init__(
        self,
        world: World,
        delta: ModelDelta,
        steps_until_round: Callable[[Records], float],
        damping: Callable[[Records], float],
        max_lag: int | None,
        target: Callable[[], int],
    ) -> None:
        self._world, self._delta, self._max_lag = world, delta, max_lag
        self._steps_until_round, self._damping = steps_until_round, damping
        # The compute thread holds this for the optimizer's update and a merge, the communication thread for
        # a snapshot or the end of a round: neither ever waits for a forward or a backward pass. On a GPU both
        # only queue their work then, each after the event of the other.
        self._lock = threading.Lock()
        self._updated = self._passed = record_event(world.device)
        self._steps_begun, self._target = 0, target
        self._rounds_started = self._rounds_recorded = 0
        self._snapshot_step = self._correction_step = self._merge_step = 0
        self._in_flight = self._pending = self._quiescing = self._quiet = False
        self.statistics = RoundStatistics()
        self._records: Records = np.zeros(world.size, RECORD).view(np.recarray)
        # A single rank has nothing to average.
        self._control = (
            ControlAllgather(world, RECORD, self._make_record, self._on_records) if world.size > 1 else None
        )

    def total_steps(self, *, begun: bool = False) -> int:
        """Return the steps of all ranks, as of the last records; `begun`: with those being taken."""
        known = self._records.steps_begun if begun else self._records.steps
        local_steps = self._steps_begun if begun else self.steps
        return int(known.sum()) - int(known[self._world.rank]) + local_steps

    @property
    def steps(self) -> int:
        """Steps completed by this rank."""
        return self.statistics.totals.steps

    def is_finished(self) -> bool:
        """Return whether this rank takes no more steps: all steps of the target have begun.

        Also true if the other ranks will finish the remaining steps before this rank could complete one.
        Never true for the fastest rank, so progress is guaranteed.
        """
        left = self._target() - self.total_steps(begun=True)
        if left <= 0:
            return True
        seconds = self._records.step_seconds
        others = (seconds > 0) & ~self._records.quiescing
        others[self._world.rank] = False
        if not others.any():
            return False
        seconds_of_others = max(seconds[others].min(), left / (1 / seconds[others]).sum())
        return bool(self.statistics.step_seconds > _LATE * seconds_of_others)

    def begin_step(self) -> None:
        """Record that a step has begun."""
        self._steps_begun = self.steps + 1
        self.statistics.begin_step()
        if self._control is not None:
            self._control.request()

    def step(self, update: Callable[[], None]) -> None:
        """Run the optimizer's update, and merge a pending correction."""
        self._world.progress.check()
        if self._steps_begun == self.steps:
            self.begin_step()
        with self._for_update():
            update()
            self.statistics.totals.steps += 1
            self._merge()
        self.statistics.end_step()
        self._enforce_max_lag()
        self.statistics.begin_step()

    def quiesce(self) -> None:
        """Wait until no round is in flight on any rank, and merge the last correction; collective."""
        if self._control is None:
            return
        self._steps_begun, self._quiet = self.steps, False
        self._quiescing = True
        self._control.request()
        self._until(lambda: self._quiet, "the end of the rounds of averaging")
        self._quiescing = False
        with self._for_update():
            self._merge()

    def close(self) -> None:
        """Stop; only while quiescent."""
        if self._control is not None:
            self._control.close()

    def abandon(self) -> None:
        """Stop after the run was dropped or left; local, also called by the garbage collector."""
        if self._control is not None:
            self._control.abandon()

    def _enforce_max_lag(self) -> None:
        # A snapshot may be older than the last merge, which is that of the round before.
        oldest = min(self._merge_step, self._snapshot_step) if self._in_flight else self._merge_step
        if self._max_lag is None or self._control is None or self.steps - oldest < self._max_lag:
            return
        with self.statistics.waiting():
            self._until(lambda: self._pending, _ROUND)
        with self._for_update():
            self._merge()

    def _until(self, done: Callable[[], bool], what: str) -> None:
        assert self._control is not None
        control = self._control
        self._world.progress.until(lambda: done() or control.is_left, what, lambda: control.missing)
        if not done():
            raise rank_left(f"{what} never comes: another rank has left the run", self._world.global_rank)

    def _merge(self) -> None:
        if self._pending:
            with self.statistics.merging(self.steps - self._correction_step):
                self._delta.apply()
            self._pending, self._merge_step = False, self.steps

    @contextmanager
    def _for_update(self) -> Iterator[None]:
        """Context in which the compute thread changes the model."""
        with self._lock:
            wait_for(self._passed, self._world.device)
            yield
            self._updated = record_event(self._world.device)

    # In the communication thread.

    @contextmanager
    def _for_pass(self) -> Iterator[None]:
        """Context in which the communication thread reads the model or changes the correction."""
        device = self._world.device
        with self._lock, side_stream(device):
            wait_for(self._updated, device)
            yield
            self._passed = record_event(device)

    def _make_record(self) -> np.ndarray:
        statistics, steps = self.statistics, self.steps
        record = (
            steps,
            self._steps_begun,
            steps - self._snapshot_step,
            self._quiescing,
            statistics.totals.rounds,
            statistics.squared_distance,
            statistics.squared_norm,
            statistics.step_seconds,
            statistics.round_seconds,
            statistics.round_cpu_seconds,
        )
        return np.array([record], RECORD)

    def _on_records(self, table: np.ndarray) -> float | None:
        self._records = records = table.view(np.recarray)
        no_round_open = bool((records.rounds == self._rounds_started).all())
        if no_round_open and self._rounds_recorded < self._rounds_started:
            self._rounds_recorded = self._rounds_started
            self.statistics.totals.drift += math.sqrt(records.squared_distance.mean())
        if no_round_open and records.quiescing.all():
            self._quiet = True
            return None
        steps_until_round = self._steps_until_round(records)
        if no_round_open and steps_until_round == 0:
            self._rounds_started += 1
            begin = partial(self._begin_round, self._rounds_started, self._damping(records))
            self._world.progress.submit(f"{_ROUND}: snapshot {self._rounds_started}", begin)
        return self._pause(records, steps_until_round)

    def _pause(self, records: Records, steps_until_round: float) -> float:
        """Return the seconds until the next all-gather: short before an event, as each one costs time."""
        left = (self._target() - int(records.steps_begun.sum())) / self._world.size
        steps = _SHARE * max(1.0, min(steps_until_round, left))
        pause = (_SHARE_QUIESCING if records.quiescing.any() else steps) * fastest_step_seconds(records)
        return min(max(pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    def _begin_round(self, number: int, share: float) -> None:
        self.statistics.begin_round()
        with self._for_pass():
            self._delta.snapshot(self._pending)
            self._snapshot_step, self._in_flight = self.steps, True
        with side_stream(self._world.device):  # a round must not wait for work that training queues later
            self._delta.start(number)
        self._world.progress.submit(f"{_ROUND}: end of {number}", partial(self._end_round, share))

    def _end_round(self, share: float) -> None:
        self._delta.finish()
        with self._for_pass():
            squares, norms = self._delta.accumulate(share)
            self._pending, self._correction_step, self._in_flight = True, self._snapshot_step, False
        with side_stream(self._world.device):
            self.statistics.end_round(sum(map(float, squares)), sum(float(norm) ** 2 for norm in norms))

    # While quiescent.

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank."""
        return {
            "steps": self._records.steps.tolist(),
            "shot_at": self._snapshot_step,
            "merged_at": self._merge_step,
            "tally": self.statistics.state_dict(),
            "delta": self._delta.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._records = np.zeros(self._world.size, RECORD).view(np.recarray)
        self._records.steps = self._records.steps_begun = state["steps"]
        self._steps_begun = state["steps"][self._world.rank]
        self._snapshot_step, self._merge_step = state["shot_at"], state["merged_at"]
        self.statistics.load_state_dict(state["tally"])
        self._rounds_started = self._rounds_recorded = self.statistics.totals.rounds
        self._delta.load_state_dict(state["delta"])


def fastest_step_seconds(records: Records) -> float:
    """Return the step time of the fastest rank, in seconds; 0 before any step."""
    measured = records.step_seconds[records.step_seconds > 0]
    return float(measured.min()) if len(measured) else 0.0
