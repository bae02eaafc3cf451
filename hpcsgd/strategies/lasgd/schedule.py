"""When rounds of averaging start, and how much of what they bring is merged; of what all ranks know alike."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from hpcsgd.strategies.lasgd.averaging import Records, fastest_step

_SHARE = 0.03  # of the training's time that averages may take from it
_DRIFT = 0.02  # of the model's norm
_LONGEST = 64  # steps


Trigger = Literal["any", "all", "free"]


def wanted(records: Records, trigger: Trigger, period: int) -> float:
    """In how many steps a round is wanted; 0: now."""
    if trigger == "free":
        return 0 if (records.since > 0).any() else 1
    left = np.maximum(period - records.since, 0)[~records.resting]
    return float(left.min(initial=period) if trigger == "any" else left.max(initial=0))


def damping(records: Records, max_lag: int | None) -> float:
    """1 divided by the steps that the fastest rank takes during a round, where these are more than one.

    While a round goes on, gradients too pull a model back that is apart from the others. Where the merge
    then adds all that the snapshot was apart, it corrects twice, and in steep directions too much. Our own
    rule, after staleness-aware learning rates (arXiv 1511.05950).
    """
    step = fastest_step(records)
    lag = float(records.round_seconds.max()) / step if step else 0.0
    return 1.0 / max(1.0, lag if max_lag is None else min(lag, max_lag))


class Fixed:
    """A period that is always the same.

    Parameters
    ----------
    steps
        The period.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def of(self, records: Records) -> int:
        """The period now, from what all ranks know alike."""
        return self.steps


class Adaptive(Fixed):
    """A period as short as it can be without slowing the training down; our own rule.

    Nobody waits for a round, however long it takes on the network, and it starts when the one before is
    over. What it does take is time of a core: for snapshot, all-reduce and merge. The period is the
    shortest with which this is at most 3 % of a step of the fastest rank; but shorter where models drift
    apart, so that their distance from their mean stays below 2 % of its norm.

    Parameters
    ----------
    longest
        The longest period, in steps; None: 64.
    """

    def __init__(self, longest: int | None) -> None:
        super().__init__(1)
        self._longest = min(longest or _LONGEST, _LONGEST)
        self._rounds = 0

    def of(self, records: Records) -> int:
        rounds, step = int(records.rounds.min()), fastest_step(records)
        if rounds == self._rounds or not step:
            return self.steps
        self._rounds = rounds
        hidden = math.ceil(float(records.round_cost.max()) / (_SHARE * step))
        drift, bound = math.sqrt(records.squares.mean()), _DRIFT * math.sqrt(records.norm.mean())
        tame = int(self.steps * bound / drift) if drift > bound else self._longest
        self.steps = max(1, min(hidden, tame, self._longest))
        return self.steps
