"""How many steps lie between two averages: as many as the user says, or as they cost."""

from __future__ import annotations

import math

from hpcsgd.collectives.averaging import Records, fastest_step

_SHARE = 0.03  # of the training's time that averages may take from it
_DRIFT = 0.02  # of the model's norm
_LONGEST = 64  # steps


class Fixed:
    """Always the same.

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
    """As short as it can be without slowing the training down; our own rule.

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
