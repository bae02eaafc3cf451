"""The interface of a check: it collects facts on every rank, describes them, and finds mistakes in them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from hpcsgd.commands.doctor.ranks import ExaminedJob

#: The facts of one rank from all checks, by name.
Facts = dict[str, Any]
FactsByRank = Sequence[Facts]


@dataclass(frozen=True)
class Finding:
    """A mistake and its fix."""

    #: "error": training fails or its result is useless. "warning": it is slower or less safe than possible.
    level: Literal["error", "warning"]
    #: The mistake and its fix, one sentence each.
    problem: str
    fix: str


@dataclass(frozen=True)
class Check:
    """One check of the doctor."""

    name: str  # one word, the title of the check's lines
    collect: Callable[[ExaminedJob], Facts]  # returns the facts of this rank; collective
    describe: Callable[[FactsByRank], Iterable[str]]  # returns the facts of all ranks as lines of the page
    #: Yields the mistakes in the facts of all ranks, from this check and those before it; uses no MPI.
    diagnose: Callable[[FactsByRank], Iterator[Finding]]


def ranks_by_value(ranks: FactsByRank, value: Callable[[Facts], Hashable]) -> dict[Any, list[int]]:
    """The ranks with each value, in the order of first appearance."""
    found: dict[Any, list[int]] = {}
    for rank, facts in enumerate(ranks):
        found.setdefault(value(facts), []).append(rank)
    return found


def ranks_by_node(ranks: FactsByRank) -> dict[int, list[int]]:
    """The ranks of each node."""
    return ranks_by_value(ranks, lambda facts: facts["node"])


def name_ranks(members: Sequence[int], ranks: FactsByRank) -> str:
    """Ranks as text: "rank 3 on h2", "ranks 0-3, 7", or "every rank"."""
    if len(members) == len(ranks) > 1:
        return "every rank"
    if len(members) == 1:
        return f"rank {members[0]} on {ranks[members[0]].get('host', 'an unknown host')}"
    # Consecutive numbers have equal differences to their positions.
    runs = [list(run) for _, run in groupby(enumerate(members), lambda pair: pair[1] - pair[0])]
    ranges = [(run[0][1], run[-1][1]) for run in runs]
    return "ranks " + ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def lines_by_value(ranks: FactsByRank, value: Callable[[Facts], Hashable]) -> Iterator[str]:
    """The value alone if it is equal on all ranks; else a line per value, with its ranks."""
    found = ranks_by_value(ranks, value)
    for text, members in found.items():
        yield str(text) if len(found) == 1 else f"{text} ({name_ranks(members, ranks)})"
