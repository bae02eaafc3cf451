"""What failed, on which rank, expected and got, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class HpcsgdError(RuntimeError):
    """An error of hpcsgd, in one shape: what failed, where, expected and got, and the remedy.

    Parameters
    ----------
    what
        One clause: what failed.
    rank
        The rank, or ranks, it concerns.
    expected, got
        What was needed and what was found; left out where they would say nothing.
    do
        What the reader should do now.
    everywhere
        True where all ranks raise this same error, so that one of them is enough to print it.
    """

    def __init__(
        self,
        what: str,
        *,
        rank: int | Iterable[int] | None = None,
        expected: object = None,
        got: object = None,
        do: str | None = None,
        everywhere: bool = False,
    ) -> None:
        lines = [what if rank is None else f"{_ranks(rank)}: {what}"]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if got is not None:
            lines.append(f"  got:      {got}")
        if do is not None:
            lines.append(f"  do:       {do}")
        super().__init__("\n".join(lines))
        self.everywhere = everywhere


class Disagreement(HpcsgdError):
    """Ranks that should have brought the same thing brought different ones."""


class DeadlineExceeded(HpcsgdError, TimeoutError):
    """A wait ended without what it waited for; the message says who waits for whom, and where."""


class RankFailed(HpcsgdError):
    """Ranks of the job have died; the others are left as they were."""


class BadOption(HpcsgdError, ValueError):
    """An option that does not exist, or a value out of its range; the message lists the valid ones."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> BadOption:
    """The error for a name that no registry row answers to."""
    return BadOption(f"unknown {kind} {name!r}", do="use one of: " + ", ".join(sorted(valid)))


def _ranks(rank: int | Iterable[int]) -> str:
    if isinstance(rank, int):
        return f"rank {rank}"
    ranks = sorted(rank)
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
