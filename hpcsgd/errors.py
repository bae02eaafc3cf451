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
    elsewhere
        True where another rank says more about the same, and is to be printed first.
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
        elsewhere: bool = False,
    ) -> None:
        lines = [what if rank is None else f"{in_words(rank)}: {what}"]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if got is not None:
            lines.append(f"  got:      {got}")
        if do is not None:
            lines.append(f"  do:       {do}")
        super().__init__("\n".join(lines))
        self.everywhere = everywhere
        self.elsewhere = elsewhere


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


def in_words(ranks: int | Iterable[int]) -> str:
    """As "rank 3", or "ranks 0, 2, 7 to 90"."""
    numbers = [ranks] if isinstance(ranks, int) else sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{r[0]} to {r[-1]}" if len(r) > 4 else ", ".join(map(str, r)) for r in runs]
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(parts)
