"""What a check is: facts from every rank, lines for the page, and the mistakes these facts show."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from hpcsgd.commands.doctor.ranks import Job

#: What one rank found out, of all checks; a key names one fact.
Facts = dict[str, Any]
Ranks = Sequence[Facts]


@dataclass(frozen=True)
class Finding:
    """A mistake and its fix.

    Attributes
    ----------
    level
        "error": training fails or is of no use. "warning": it is slower or less safe than it could be.
    what, fix
        One sentence each.
    """

    level: Literal["error", "warning"]
    what: str
    fix: str


@dataclass(frozen=True)
class Check:
    """One thing that the doctor looks at.

    Attributes
    ----------
    name
        One word: its line's title.
    gather
        The facts of this rank; collective, so called on all ranks in the same order.
    show
        The facts of all ranks as lines of the page.
    judge
        The mistakes in the facts of all ranks, of this check and those before; no MPI.
    """

    name: str
    gather: Callable[[Job], Facts]
    show: Callable[[Ranks], Iterable[str]]
    judge: Callable[[Ranks], Iterator[Finding]]


def group(ranks: Ranks, value: Callable[[Facts], Hashable]) -> dict[Any, list[int]]:
    """The ranks that have each value, by first appearance."""
    found: dict[Any, list[int]] = {}
    for rank, facts in enumerate(ranks):
        found.setdefault(value(facts), []).append(rank)
    return found


def nodes_of(ranks: Ranks) -> dict[int, list[int]]:
    """The ranks of each node."""
    return group(ranks, lambda facts: facts["node"])


def name_of(members: Sequence[int], ranks: Ranks) -> str:
    """ "rank 3 on h2", "ranks 0-3, 7", or "every rank"."""
    if len(members) == len(ranks) > 1:
        return "every rank"
    if len(members) == 1:
        return f"rank {members[0]} on {ranks[members[0]].get('host', 'an unknown host')}"
    # Numbers that follow each other have the same distance to their positions.
    runs = [list(run) for _, run in groupby(enumerate(members), lambda pair: pair[1] - pair[0])]
    stretches = [(run[0][1], run[-1][1]) for run in runs]
    return "ranks " + ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in stretches)


def shown(found: dict[Any, list[int]], ranks: Ranks) -> Iterator[str]:
    """The value alone where all ranks have one; else a line for each, with who has it."""
    for value, members in found.items():
        yield str(value) if len(found) == 1 else f"{value} ({name_of(members, ranks)})"
