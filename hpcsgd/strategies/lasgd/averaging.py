"""Rounds of averaging beside the training steps: when they start, and how they end on all ranks alike."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hpcsgd.collectives.staging import beside_compute, computed, side_stream
from hpcsgd.mpi.world import World
from hpcsgd.strategies.lasgd.heartbeat import Beats
from hpcsgd.strategies.lasgd.model_delta import Delta
from hpcsgd.strategies.lasgd.statistics import Tally

#: What ranks tell each other in a beat.
RECORD = np.dtype(
    [
        ("steps", np.int64),  # taken
        ("begun", np.int64),  # and those under way
        ("since", np.int64),  # steps since the last snapshot
        ("resting", np.bool_),  # takes no steps until all have come to rest
        ("rounds", np.int64),  # completed
        ("squares", np.float64),  # of the distance of the last snapshot from its average
        ("norm", np.float64),  # of that average, squared
        ("step_seconds", np.float64),
        ("round_seconds", np.float64),
        ("round_cost", np.float64),  # seconds of a core
    ]
)
NO_GOAL = 2**62
Records = Any  # a record array of RECORD, one a rank

#: Between two beats: this share of the time to what comes next, but at least of a step, and seconds.
_SHARE, _SHORTEST_PAUSE, _LONGEST_PAUSE = 0.5, 1e-3, 0.2
_SHARE_AT_REST = 0.06  # of a step, while one waits until the others have come to rest too
#: Steps take about so long, not just so long: who would be late by less than this factor takes one more.
_LATE = 1.5
_WHAT = "a round of averaging"


class Averaging:
    """This rank's part in rounds that start when all see them wanted; collective when made.

    Beats carry all that is decided together, so every rank starts the same rounds in the same order, and
    all know when each has come to rest: nothing else needs an agreement, whoever finishes first. The
    rounds themselves are jobs of the communication thread.

    Parameters
    ----------
    world
        The ranks.
    delta
        This rank's model and what is averaged.
    wanted
        From the records of all ranks: in how many steps a round is wanted; 0: now. The same on all ranks.
    share
        Likewise: how much of what the round brings is merged, see `Delta.advance`.
    max_lag
        Steps after a merge, or the snapshot of what is yet to be merged, that this rank takes before it waits
        for the next merge; None: any number.

    Attributes
    ----------
    tally
        What its steps and rounds were like.
    goal
        How many steps all ranks together shall have begun when they next come to rest.
    """

    def __init__(
        self,
        world: World,
        delta: Delta,
        wanted: Callable[[Records], float],
        share: Callable[[Records], float],
        max_lag: int | None,
    ) -> None:
        self._world, self._delta, self._max_lag = world, delta, max_lag
        self._wanted, self._share = wanted, share
        # The compute thread has this for the optimizer's update and a merge, the communication thread for
        # a snapshot or the end of a round: neither ever waits for a forward or a backward pass.
        self._lock = threading.Lock()
        self._updated = computed(world.device)
        self._begun, self.goal = 0, NO_GOAL
        self._started = self._noted = 0  # rounds
        self._shot_at = self._pending_of = self._merged_at = 0  # in steps
        self._in_flight = self._pending = self._resting = self._quiet = False
        self.tally = Tally()
        self._records: Records = np.zeros(world.size, RECORD).view(np.recarray)
        # One rank alone has nothing to average.
        self._beats = Beats(world, self._speak, self._hear) if world.size > 1 else None

    def total(self, *, begun: bool = False) -> int:
        """The steps of all ranks that this one knows of; with those under way, where `begun`."""
        known = self._records.begun if begun else self._records.steps
        own = self._begun if begun else self.steps
        return int(known.sum()) - int(known[self._world.rank]) + own

    @property
    def steps(self) -> int:
        """Taken by this rank."""
        return self.tally.totals.steps

    def done(self) -> bool:
        """Whether this rank shall take no more steps: all that the goal asks for are taken or under way.

        Or others will have taken them before this rank were through with one. Of the fastest rank that is
        never true: somebody always goes on.
        """
        left = self.goal - self.total(begun=True)
        if left <= 0:
            return True
        seconds = self._records.step_seconds
        others = (seconds > 0) & ~self._records.resting
        others[self._world.rank] = False
        if not others.any():
            return False
        theirs = max(seconds[others].min(), left / (1 / seconds[others]).sum())
        return bool(self.tally.step_seconds > _LATE * theirs)

    def begin(self) -> None:
        """A step is under way."""
        self._begun = self.steps + 1
        self.tally.begin_step()
        if self._beats is not None:
            self._beats.wake()

    def step(self, update: Callable[[], None]) -> None:
        """Let the optimizer change the model, and merge what has come meanwhile."""
        self._world.progress.check()
        if self._begun == self.steps:
            self.begin()
        with self._lock:
            update()
            self.tally.totals.steps += 1
            self._merge()
        self.tally.end_step()
        self._wait_for_a_round()
        self.tally.begin_step()

    def rest(self) -> None:
        """Come to rest: no round is under way, and the model has all that it gained; collective."""
        if self._beats is None:
            return
        self._begun, self._quiet = self.steps, False
        self._resting = True
        self._beats.wake()
        self._until(lambda: self._quiet, "the end of the rounds of averaging")
        self._resting = False
        with self._lock:
            self._merge()

    def close(self) -> None:
        """Come to rest for good; collective."""
        self.rest()
        if self._beats is not None:
            self._beats.close()

    def _wait_for_a_round(self) -> None:
        # A snapshot may be older than the last merge, that of the round before.
        oldest = min(self._merged_at, self._shot_at) if self._in_flight else self._merged_at
        if self._max_lag is None or self._beats is None or self.steps - oldest < self._max_lag:
            return
        with self.tally.waiting():
            self._until(lambda: self._pending, _WHAT)
        with self._lock:
            self._merge()

    def _until(self, done: Callable[[], bool], what: str) -> None:
        assert self._beats is not None
        beats = self._beats
        self._world.progress.until(done, what, lambda: beats.missing)

    def _merge(self) -> None:
        if self._pending:
            with self.tally.merging(self.steps - self._pending_of):
                self._delta.merge()
            self._pending, self._merged_at = False, self.steps
        self._updated = computed(self._world.device)

    # What the communication thread does.

    def _speak(self) -> np.ndarray:
        tally, steps = self.tally, self.steps
        record = (
            steps,
            self._begun,
            steps - self._shot_at,
            self._resting,
            tally.totals.rounds,
            tally.squares,
            tally.norm,
            tally.step_seconds,
            tally.round_seconds,
            tally.round_cost,
        )
        return np.array([record], RECORD)

    def _hear(self, table: np.ndarray) -> float | None:
        self._records = records = table.view(np.recarray)
        between = bool((records.rounds == self._started).all())
        if between and self._noted < self._started:
            self._noted = self._started
            self.tally.totals.drift += math.sqrt(records.squares.mean())
        if between and records.resting.all():
            self._quiet = True
            return None
        wanted = self._wanted(records)
        if between and wanted == 0:
            self._started += 1
            begin = partial(self._begin_round, self._started, self._share(records))
            self._world.progress.submit(f"{_WHAT}: snapshot {self._started}", begin)
        return self._pause(records, wanted)

    def _pause(self, records: Records, wanted: float) -> float:
        """Seconds to the next beat: what is about to happen shall be known soon, and beats cost time too."""
        left = (self.goal - int(records.begun.sum())) / self._world.size
        share = _SHARE_AT_REST if records.resting.any() else _SHARE * max(1.0, min(wanted, left))
        pause = share * fastest_step(records)
        return min(max(pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    def _begin_round(self, number: int, share: float) -> None:
        self.tally.begin_round()
        with self._lock, beside_compute(self._world.device, self._updated):
            self._delta.begin(self._pending)
            self._shot_at, self._in_flight = self.steps, True
        with side_stream(self._world.device):  # a round shall not wait for what the training has queued since
            self._delta.start(number)
        self._world.progress.submit(f"{_WHAT}: end of {number}", partial(self._end_round, share))

    def _end_round(self, share: float) -> None:
        self._delta.finish()
        with self._lock, beside_compute(self._world.device, self._updated):
            found = self._delta.advance(share)
            self._pending, self._pending_of, self._in_flight = True, self._shot_at, False
        self.tally.end_round(*found)

    # At rest.

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold, of this rank; collective."""
        self.rest()
        return {
            "steps": self._records.steps.tolist(),
            "shot_at": self._shot_at,
            "merged_at": self._merged_at,
            "tally": self.tally.state_dict(),
            "delta": self._delta.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; collective."""
        self.rest()
        self._records = np.zeros(self._world.size, RECORD).view(np.recarray)
        self._records.steps = self._records.begun = state["steps"]
        self._begun = state["steps"][self._world.rank]
        self._shot_at, self._merged_at = state["shot_at"], state["merged_at"]
        self.tally.load_state_dict(state["tally"])
        self._started = self._noted = self.tally.totals.rounds
        self._delta.load_state_dict(state["delta"])


def fastest_step(records: Records) -> float:
    """Seconds of a step of the fastest rank; 0 before any was taken."""
    measured = records.step_seconds[records.step_seconds > 0]
    return float(measured.min()) if len(measured) else 0.0
