"""How many steps lie between two averages: as many as the user says, or as the network needs."""

from __future__ import annotations

import math

from hpcsgd.collectives.averaging import Records

_LONGEST = 64


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
    """To be measured.

    Parameters
    ----------
    longest
        The longest period; None: 64 steps.
    """

    def __init__(self, longest: int | None) -> None:
        super().__init__(1)
        self._longest = min(longest or _LONGEST, _LONGEST)

    def of(self, records: Records) -> int:
        fastest = records.step_seconds[records.step_seconds > 0].min(initial=math.inf)
        if math.isfinite(fastest):
            ratio = float(records.round_seconds.max()) / float(fastest)
            self.steps = min(max(math.ceil(ratio), 1), self._longest)
        return self.steps
