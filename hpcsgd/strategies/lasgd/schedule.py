"""Scheduling policy of averaging rounds: period and damping, computed from records that all ranks share."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from hpcsgd.strategies.lasgd.averaging import Records, fastest_step_seconds

_MAX_COST = 0.03  # of the training time that rounds may take from it
_MAX_DRIFT = 0.02  # of the model's norm
_MAX_PERIOD = 64  # steps

Trigger = Literal["any", "all", "free"]


def steps_until_round(records: Records, trigger: Trigger, period: int) -> float:
    """Return the steps until the next round is due; 0: start one now.

    Parameters
    ----------
    records
        The records of all ranks.
    trigger
        "any": due when one rank has taken `period` steps since its snapshot; "all": when all have, except
        for those that quiesce; "free": when any rank has taken a step.
    period
        Steps between two snapshots.
    """
    if trigger == "free":
        return 0 if (records.steps_since_snapshot > 0).any() else 1
    left = np.maximum(period - records.steps_since_snapshot, 0)[~records.quiescing]
    return float(left.min(initial=period) if trigger == "any" else left.max(initial=0))


def damping(records: Records, max_lag: int | None) -> float:
    """Return 1 / lag: lag is the steps of the fastest rank during a round, at least 1, at most `max_lag`.

    While a round runs, gradients too pull back a model that is apart from the others. A merge of the whole
    distance at the snapshot then corrects twice, and in steep directions too much. Our own rule, after
    staleness-aware learning rates (arXiv 1511.05950).
    """
    step = fastest_step_seconds(records)
    lag = float(records.round_seconds.max()) / step if step else 0.0
    return 1.0 / max(1.0, lag if max_lag is None else min(lag, max_lag))


class FixedPeriod:
    """A constant period.

    Attributes
    ----------
    steps
        The current period.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def update(self, records: Records) -> int:
        """Return the period for the records of all ranks."""
        return self.steps


class AdaptivePeriod(FixedPeriod):
    """The shortest period that does not slow the training down; our own rule.

    No rank waits for a round, however long it takes on the network, and the next one starts after its end.
    Its cost is the CPU time of snapshot, all-reduce and merge. The period is the shortest for which this is
    at most 3 % of the step time of the fastest rank; it is shortened if models drift apart, so that their
    distance from the mean stays below 2 % of the mean's norm.

    Parameters
    ----------
    longest
        The longest period, in steps; None, or above 64: 64.
    """

    def __init__(self, longest: int | None) -> None:
        super().__init__(1)
        self._longest = min(longest or _MAX_PERIOD, _MAX_PERIOD)
        self._rounds = 0

    def update(self, records: Records) -> int:
        rounds, step = int(records.rounds.min()), fastest_step_seconds(records)
        if rounds == self._rounds or not step:
            return self.steps
        self._rounds = rounds
        affordable = math.ceil(float(records.round_cpu_seconds.max()) / (_MAX_COST * step))
        drift = math.sqrt(records.squared_distance.mean())
        bound = _MAX_DRIFT * math.sqrt(records.squared_norm.mean())
        stable = int(self.steps * bound / drift) if drift > bound else self._longest
        self.steps = max(1, min(affordable, stable, self._longest))
        return self.steps
