"""How far the ranks are, and what follows from it: who waits for whom, and who is to blame."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hpcsgd.diagnostics.activity import Moved
from hpcsgd.errors import in_words
from hpcsgd.mpi.waiting import Waiting


@dataclass(frozen=True)
class Standing:
    """How far a rank is; `waiting` is None where it does not answer, and empty where it does not wait."""

    moved: Moved
    waiting: tuple[Waiting, ...] | None

    @property
    def wait(self) -> Waiting | None:
        """The wait that says most: one that names ranks, else the longest."""
        return max(self.waiting or (), key=lambda wait: (bool(wait.ranks), wait.seconds), default=None)


def blamed(me: int, known: Mapping[int, Standing], size: int) -> list[int]:
    """The ranks that wait for nobody: those that `me` depends on, where that is known, else all of these."""
    free = {rank for rank in range(size) if rank not in known or not known[rank].wait}
    reached, new = set[int](), {me}
    while new:
        reached |= new
        named_by = {r for rank in new if rank in known and (wait := known[rank].wait) for r in wait.ranks}
        new = named_by - reached
    return sorted(reached & free or free)


def stand_still(culprits: list[int], known: Mapping[int, Standing], seconds: float) -> bool:
    """Whether any of them has not moved for so long, or where there are none, nobody's wait has ended."""
    if culprits:
        return any(rank not in known or known[rank].moved.ago > seconds for rank in culprits)
    return all(standing.wait and standing.wait.seconds > seconds for standing in known.values())


def waits(known: Mapping[int, Standing], culprits: Collection[int]) -> list[str]:
    """A line for each operation that ranks wait in; those that are behind come first."""
    groups = defaultdict(list)
    for rank, standing in known.items():
        if standing.wait and rank not in culprits:
            groups[standing.wait.what, standing.wait.ranks].append(rank)
    order = sorted(groups.items(), key=lambda group: min(known[rank].moved.step for rank in group[1]))
    lines = []
    for (what, on), ranks in order:
        verb = "waits" if len(ranks) == 1 else "wait"
        lines.append(f"{in_words(ranks)} {verb}" + (f" for {in_words(on)}" if on else "") + f" in {what}")
    return lines if culprits else ["every rank waits:", *lines]


def progress_of(rank: int, known: Mapping[int, Standing]) -> str:
    """A clause: what a rank did last, and when."""
    standing = known.get(rank)
    if standing is None:
        return "does not answer"
    moved = standing.moved
    verb = "it is in" if moved.in_flight else "after"
    last = f"{verb} {moved.operation}" if moved.operation else "no operation yet"
    behind = max(other.moved.step for other in known.values()) - moved.step
    text = f"has not moved for {moved.ago:.0f} s: {last}; its step is {moved.step}"
    return text + f", {behind} behind" * (behind > 0) + "; it does not answer" * (standing.waiting is None)
