"""States of ranks and conclusions from them: the roots of the wait-for graph, and lines of a stall report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hpcsgd.diagnostics.activity import LastActivity
from hpcsgd.errors import format_ranks
from hpcsgd.mpi.rank_calls import RankCalls
from hpcsgd.mpi.waiting import PendingWait


@dataclass(frozen=True)
class RankState:
    """The state of a rank: its last activity; its waits and its place, None where it does not answer."""

    last: LastActivity
    waits: tuple[PendingWait, ...] | None
    calls: RankCalls | None = None

    @property
    def wait(self) -> PendingWait | None:
        """The most informative wait: one that names ranks, else the longest."""
        return max(self.waits or (), key=lambda wait: (bool(wait.ranks), wait.seconds), default=None)


def blocking_ranks(rank: int, states: Mapping[int, RankState], size: int) -> list[int]:
    """Return the roots of the wait-for graph: ranks that wait for none.

    Those that `rank` depends on, where that is known, else all of them. A rank without a state is a root.
    """
    free = {r for r in range(size) if r not in states or not states[r].wait}
    reached, new = set[int](), {rank}
    while new:
        reached |= new
        awaited = {r for each in new if each in states and (wait := states[each].wait) for r in wait.ranks}
        new = awaited - reached
    return sorted(reached & free or free)


def is_stalled(blocking: list[int], states: Mapping[int, RankState], seconds: float) -> bool:
    """Return whether a blocking rank has been inactive for `seconds`; without any: all waits last longer."""
    if blocking:
        return any(
            rank not in states or (states[rank].last.ago > seconds and not states[rank].last.busy)
            for rank in blocking
        )
    return all(state.wait and state.wait.seconds > seconds for state in states.values())


def wait_lines(states: Mapping[int, RankState], blocking: Collection[int]) -> list[str]:
    """Return a line for each operation that ranks wait in; those of the earliest step come first."""
    groups = defaultdict(list)
    for rank, state in states.items():
        if state.wait and rank not in blocking:
            groups[state.wait.operation, state.wait.ranks].append(rank)
    order = sorted(groups.items(), key=lambda group: min(states[rank].last.step for rank in group[1]))
    lines = []
    for (operation, awaited), ranks in order:
        verb = "waits" if len(ranks) == 1 else "wait"
        objects = f" for {format_ranks(awaited)}" if awaited else ""
        lines.append(f"{format_ranks(ranks)} {verb}{objects} in {operation}")
    return lines if blocking else ["every rank waits:", *lines]


def describe_activity(rank: int, states: Mapping[int, RankState]) -> str:
    """Return a clause: the last activity of a rank, and its time."""
    state = states.get(rank)
    if state is None:
        return "does not answer"
    last = state.last
    if last.busy:
        return f"is busy: {last.busy}"
    if last.phase:
        return f"is {last.phase}, for {last.ago:.0f} s"
    verb = "it is in" if last.in_flight else "after"
    operation = f"{verb} {last.operation}" if last.operation else "no operation yet"
    behind = max(other.last.step for other in states.values()) - last.step
    text = f"has not moved for {last.ago:.0f} s: {operation}; its step is {last.step}"
    return text + f", {behind} behind" * (behind > 0) + "; it does not answer" * (state.waits is None)
