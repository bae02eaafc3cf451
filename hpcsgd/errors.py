"""Errors: the failure, its ranks, expected and got, and the remedy."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LONGEST_SHOWN = 60  # characters of a wrong value in an error
_OUT_OF_DESCRIPTORS = {
    errno.EMFILE: "raise the limit of open files of this process: ulimit -n, or LimitNOFILE of a service",
    errno.ENFILE: "the machine has too many open files: end programs, or raise fs.file-max",
}


class HpcsgdError(RuntimeError):
    """Base of all errors of hpcsgd, in one format: the failure, its ranks, expected and got, and the remedy.

    Parameters
    ----------
    what
        The failure, in one clause.
    rank
        The rank, or ranks, concerned.
    expected, got
        The required and the actual value; omitted where they add nothing.
    do
        The remedy: the option, file or call to change.
    everywhere
        True where all ranks raise this same error, so that only one prints it.
    elsewhere
        True where another rank raises the error too, and prints it unless it ends before.
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
        what = what if rank is None else f"{format_ranks(rank)}: {what}"
        super().__init__(self._format(what, expected, got, do))
        self.everywhere = everywhere
        self.elsewhere = elsewhere

    @staticmethod
    def _format(what: str, expected: object, got: object, do: str | None) -> str:
        """Return the text of the error."""
        rows = {"  expected: ": expected, "  got:      ": got, "  do:       ": do}
        return "\n".join([what, *(f"{title}{text}" for title, text in rows.items() if text is not None)])


class Disagreement(HpcsgdError):
    """Values that must be equal on all ranks differ."""


class DeadlineExceeded(HpcsgdError, TimeoutError):
    """A wait has reached its deadline; the message names its operation and the state of each rank."""


class RankFailed(HpcsgdError):
    """Ranks of the job have died; the state of the others is unchanged."""


class RankLeft(HpcsgdError):
    """A rank has left a run or a world, after an exception or without `close()`, and others wait for it."""


@contextmanager
def os_errors(what: str, *, do: str) -> Iterator[None]:
    """Raise an `OSError` of the block as an `HpcsgdError`: what has failed, why, and the remedy."""
    try:
        yield
    except OSError as error:
        raise HpcsgdError(what, got=error, do=_OUT_OF_DESCRIPTORS.get(error.errno or 0, do)) from None


def rank_left(what: str, rank: int) -> RankLeft:
    """Return the error of `rank`, which waits for one that has left."""
    return RankLeft(
        what,
        rank=rank,
        do="catch an exception on all ranks or on none: let it end the program of that rank, or leave the "
        "run on every rank",
    )


class BadOption(HpcsgdError, ValueError):
    """An unknown option, or a value outside its range; the message, one line, lists the valid ones."""

    @staticmethod
    def _format(what: str, expected: object, got: object, do: str | None) -> str:
        values = {"expected": expected, "got": got}
        given = ", ".join(f"{title} {value}" for title, value in values.items() if value is not None)
        text = ": ".join(filter(None, [what, given]))
        return re.sub(r"\s*\n\s*", " ", "; ".join(filter(None, [text, do])))


def unknown(kind: str, name: str, valid: Iterable[str]) -> BadOption:
    """Return the error for a name that is not in a registry."""
    return BadOption(f"unknown {kind} {shown(name)}", do="use one of: " + ", ".join(sorted(valid)))


def shown(value: object) -> str:
    """Return a wrong value for an error: in one line, and short."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # an integer of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def format_ranks(ranks: int | Iterable[int]) -> str:
    """Return text such as "rank 3" or "ranks 0, 2, 7 to 90"."""
    numbers = [ranks] if isinstance(ranks, int) else sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{r[0]} to {r[-1]}" if len(r) > 4 else ", ".join(map(str, r)) for r in runs]
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(parts)
