"""Calls that all ranks must make: the place of each rank in its program, and ranks that never meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpcsgd.errors import Disagreement, format_ranks

_ON_EVERY_RANK = (
    "make each of these calls on every rank, in the same step; agree on conditions by run.any(flag)"
)


@dataclass
class RankCalls:
    """The place of a rank in its program, as far as other ranks depend on it.

    Attributes
    ----------
    calls
        Number of collective calls begun: `averaged()`, `close()`, the begin of a loop.
    call
        The collective call in which the rank waits for the others; "": none.
    steps
        Number of steps begun.
    loop
        Number of loops over batches begun.
    left
        Whether the last loop was left before its end.
    synchronous
        Whether all ranks take every step.
    in_step
        Whether a step has begun and not ended.
    """

    calls: int = 0
    call: str = ""
    steps: int = 0
    loop: int = 0
    left: bool = False
    synchronous: bool = True
    in_step: bool = False

    def begin_step(self) -> None:
        """Count a step, at its first gradient or at `run.step()`."""
        if not self.in_step:
            self.in_step, self.steps = True, self.steps + 1

    def end_step(self) -> None:
        """Let the next gradient begin a step."""
        self.in_step = False

    def copy(self) -> RankCalls:
        """Return a copy, for a message."""
        return replace(self)


def different_calls(calls: list[str], ranks: list[int]) -> Disagreement:
    """Return the error for ranks that meet in different calls.

    Parameters
    ----------
    calls
        The call of each rank.
    ranks
        The number of each rank in the job.
    """
    places = "; ".join(
        f"{format_ranks([ranks[r] for r, each in enumerate(calls) if each == call])} in {call}"
        for call in dict.fromkeys(calls)
    )
    return Disagreement(
        "the ranks are in different calls",
        expected="the same call on every rank",
        got=places,
        do=_ON_EVERY_RANK,
        everywhere=True,
    )


def certain_mismatch(places: Mapping[int, RankCalls], ranks: list[int]) -> Disagreement | None:
    """Return the error for ranks that can never meet, however long they wait; None: there is none.

    Parameters
    ----------
    places
        The places of ranks, as far as known; none of them counts as slow.
    ranks
        The number of each rank in the job.
    """
    if not all(place.synchronous for place in places.values()):
        return None  # the ranks may be at different steps
    for rank, place in places.items():
        if place.call:
            passed = [r for r, p in places.items() if p.calls < place.calls and p.steps > place.steps]
            if passed:
                return Disagreement(
                    f"{place.call} was called after {place.steps} steps, and others have begun the next one",
                    rank=ranks[rank],
                    expected=f"{format_ranks([ranks[r] for r in passed])} in {place.call} too",
                    got=f"{format_ranks([ranks[r] for r in passed])} in step {places[passed[0]].steps}",
                    do=_ON_EVERY_RANK,
                )
        if place.left:
            ahead = [
                r for r, p in places.items() if p.loop == place.loop and not p.left and p.steps > place.steps
            ]
            if ahead:
                return Disagreement(
                    f"the loop over run.batches() was left after {place.steps} steps, and other ranks go on",
                    rank=ranks[rank],
                    got=f"{format_ranks([ranks[r] for r in ahead])} in step {places[ahead[0]].steps}",
                    do="leave the loop in the same step on all ranks: if run.any(flag): break",
                )
    return None
