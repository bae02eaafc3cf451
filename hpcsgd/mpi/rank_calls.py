"""Calls that all ranks must make: the place of each rank in its program, and ranks that never meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from hpcsgd.errors import Disagreement, format_ranks

_ON_EVERY_RANK = (
    "make each of these calls on every rank, in the same step; agree on conditions by run.any(flag)"
)

EQUAL_PASSES = (
    "run equally many backward passes on every rank, or all of a step but the last inside `with "
    "run.accumulate():`, or call run.skip()"
)

#: By world, the number of its backward pass whose gradients this process averages now.
_averaging: dict[str, int] = {}


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
        Number of steps begun since the last run of the world was made.
    loop
        Number of loops over batches begun.
    left
        Whether the last loop was left before its end.
    at_end
        Whether the rank waits for the others at the end of the loop.
    synchronous
        Whether all ranks take every step.
    background
        Whether the communication threads do what steps need of other ranks.
    in_step
        Whether a step has begun and not ended.
    passes
        Number of backward passes since then of which the gradients have been averaged, the one in progress
        included.
    completing
        Whether the rank waits for the others in an exchange of the status of this step, after its backward
        passes.
    skipping
        Whether the rank leaves this step out, and takes part in the backward passes of the others.
    weighted
        Whether the ranks have weights in a step.
    world
        A name of the world that is the same on all its ranks.
    averaging
        In a copy: by world, also by others than this one, the number of the backward pass whose gradients the
        rank's process averages now.
    """

    calls: int = 0
    call: str = ""
    steps: int = 0
    loop: int = 0
    left: bool = False
    at_end: bool = False
    synchronous: bool = True
    background: bool = False
    in_step: bool = False
    passes: int = 0
    completing: bool = False
    skipping: bool = False
    weighted: bool = False
    world: str = ""
    averaging: dict[str, int] = field(default_factory=dict)

    def begin_run(self) -> None:
        """Count from 0 on all ranks, which may have taken unequal numbers of steps before an error."""
        self.steps = self.passes = 0
        self.end_step()

    def begin_step(self) -> None:
        """Count a step, at its first gradient or at `run.step()`."""
        if not self.in_step:
            self.in_step, self.steps = True, self.steps + 1

    def end_step(self) -> None:
        """Let the next gradient begin a step."""
        self.in_step = self.skipping = self.weighted = False

    @contextmanager
    def in_pass(self) -> Iterator[None]:
        """Context in which the gradients of one more backward pass are averaged."""
        self.passes += 1
        if self.world:  # worlds of one rank have no name
            _averaging[self.world] = self.passes
        try:
            yield
        finally:
            _averaging.pop(self.world, None)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Context in which the rank waits for the others at the end of a loop."""
        self.at_end = True
        try:
            yield
        finally:
            self.at_end = False

    @contextmanager
    def completed(self) -> Iterator[None]:
        """Context in which the rank waits for the others in an exchange of the status of this step."""
        self.completing = True
        try:
            yield
        finally:
            self.completing = False

    def copy(self) -> RankCalls:
        """Return a copy, for a message."""
        return replace(self, averaging=dict(_averaging))


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


def certain_mismatch(
    places: Mapping[int, RankCalls], ranks: list[int], awaited: Mapping[int, tuple[int, ...]] | None = None
) -> Disagreement | None:
    """Return the error for ranks that can never meet, however long they wait; None: there is none.

    Parameters
    ----------
    places
        The places of ranks, as far as known; none of them counts as slow.
    ranks
        The number of each rank in the job.
    awaited
        The ranks for which each rank waits, where they are known. Default: of none.
    """
    waits = awaited or {}
    if not all(place.synchronous for place in places.values()):
        # The ranks may be at different steps.
        found = (_left_behind(rank, places, waits, ranks) for rank in places)
    else:
        checks = (_passed_by, _left_alone, _completed_early)
        found = (error for rank in places for check in checks if (error := check(rank, places, ranks)))
    return next((error for error in found if error is not None), None)


def _passed_by(rank: int, places: Mapping[int, RankCalls], ranks: list[int]) -> Disagreement | None:
    """The error for a rank in a call that others have not made, and are beyond."""
    place = places[rank]
    passed = [r for r, p in places.items() if p.calls < place.calls and p.steps > place.steps]
    if not place.call or not passed:
        return None
    others = _named(passed, ranks)
    return Disagreement(
        f"{place.call} was called after {place.steps} steps, and others have begun the next one",
        rank=ranks[rank],
        expected=f"{others} in {place.call} too",
        got=f"{others} in step {places[passed[0]].steps}",
        do=_ON_EVERY_RANK,
    )


def _left_alone(rank: int, places: Mapping[int, RankCalls], ranks: list[int]) -> Disagreement | None:
    """The error for a rank that has left a loop in which others are beyond its steps."""
    place = places[rank]
    ahead = [r for r, p in places.items() if p.loop == place.loop and not p.left and p.steps > place.steps]
    if not place.left or not ahead:
        return None
    return Disagreement(
        f"the loop over run.batches() was left after {place.steps} steps, and other ranks go on",
        rank=ranks[rank],
        got=f"{_named(ahead, ranks)} in step {places[ahead[0]].steps}",
        do="leave the loop in the same step on all ranks: if run.any(flag): break",
    )


def _completed_early(rank: int, places: Mapping[int, RankCalls], ranks: list[int]) -> Disagreement | None:
    """The error for a rank that has run all backward passes of a step, of which others run more."""
    place = places[rank]
    more = [r for r, p in places.items() if p.in_step and p.steps == place.steps and p.passes > place.passes]
    if not place.completing or not more:
        return None
    return Disagreement(
        f"step {place.steps} has more backward passes on other ranks than on this one",
        rank=ranks[rank],
        got=f"{places[more[0]].passes - place.passes} more on {_named(more, ranks)}",
        do=EQUAL_PASSES,
    )


def _left_behind(
    rank: int, places: Mapping[int, RankCalls], waits: Mapping[int, tuple[int, ...]], ranks: list[int]
) -> Disagreement | None:
    """The error for a rank that has left a loop and waits in a call, where others wait for it in that loop.

    Those are at its end, or in a step that only ranks that have left can complete.
    """
    place = places[rank]
    if not place.left or not place.call:
        return None
    gone = {r for r, p in places.items() if p.left and p.call and p.loop == place.loop}
    behind = [
        r
        for r, p in places.items()
        if p.loop == place.loop
        and not p.left
        and (p.at_end or (p.in_step and not p.background and waits.get(r) and gone.issuperset(waits[r])))
    ]
    if not behind:
        return None
    where = "at its end" if places[behind[0]].at_end else f"in step {places[behind[0]].steps}"
    return Disagreement(
        f"the loop over run.batches() was left for {place.call}, and other ranks wait in it for this one",
        rank=ranks[rank],
        got=f"{_named(behind, ranks)} {where}",
        do="end the loop on all ranks by run.batches(loader, steps=100), and decide between two such loops: "
        "if run.any(flag): break",
    )


def _named(some: list[int], ranks: list[int]) -> str:
    return format_ranks([ranks[r] for r in some])
