"""Limits of options, declared in annotations: ``period: Annotated[int, Within(1, 10**9)]``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

# Control characters, separators of lines, and bytes of a path that are no text: they break lines and files.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Within:
    """Range of a number; both ends belong to it, and NaN never does.

    Parameters
    ----------
    least, largest
        The ends.
    """

    least: float
    largest: float

    def admits(self, value: float) -> bool:
        """Return whether a number is in the range."""
        return self.least <= value <= self.largest

    def __str__(self) -> str:
        return f"from {_short(self.least)} to {_short(self.largest)}"


@dataclass(frozen=True)
class Text:
    """Length of a text, in bytes; control characters never belong to it.

    Parameters
    ----------
    shortest, longest
        The smallest and the largest length. Default 0 and 4096, the longest path.
    """

    shortest: int = 0
    longest: int = 4096

    def admits(self, value: object) -> bool:
        """Return whether a text, or a path, is one of these."""
        text = str(value)
        return not _UNPRINTABLE.search(text) and self.shortest <= len(text.encode()) <= self.longest

    def __str__(self) -> str:
        return f"of {self.shortest} to {self.longest} bytes without control characters"


@dataclass(frozen=True)
class Accepted:
    """Texts that a function accepts: the specs of a registry.

    Parameters
    ----------
    function
        Raises `BadOption`, or `ValueError`, for all other texts.
    such_as
        Examples, for the error where it is `ValueError`.
    check_name
        Raises the same errors of the name in a spec alone, without importing what it names.
    """

    function: Callable[[str], Any]
    such_as: str = ""
    check_name: Callable[[str], Any] | None = None

    def admits(self, value: str) -> bool:
        """Return True, or raise the error of the function."""
        self.function(value)
        return True

    def __str__(self) -> str:
        return f"such as {self.such_as}" if self.such_as else ""


#: The kinds of limits.
Limit = Within | Text | Accepted

#: Seed of random numbers, of 64 bits.
Seed = Annotated[int, Within(0, 2**64 - 1)]
#: Seconds of a simulated or scheduled time; a billion are 31 years.
Seconds = Annotated[float, Within(0, 1e9)]
#: Seconds after which something ends or begins.
Timeout = Annotated[float, Within(1e-3, 1e9)]
#: Rule by which servers apply pushes, and coefficient of elastic averaging, between 0 and 1.
ServerMode = Literal["sync", "async", "elastic"]
ElasticAlpha = Annotated[float, Within(1e-6, 0.999999)]
#: Size of a bucket in MiB; of infinite size is one bucket.
BucketMib = Annotated[float, Within(1e-9, float("inf"))]
#: Number of peers, of which there is a square matrix.
PeerCount = Annotated[int, Within(1, 2**15)]
#: A number of steps, samples or other things that memory does not limit.
Count = Annotated[int, Within(1, 10**9)]
#: The same, where 0 is a number too.
Natural = Annotated[int, Within(0, 10**9)]
#: Dirichlet parameter of the label skew.
Skew = Annotated[float, Within(1e-6, 1e6)]
#: A size that memory limits: of a layer, a batch, a dimension.
Size = Annotated[int, Within(1, 10**6)]


def _short(number: float) -> str:
    """The shortest text of a number that is exact."""
    text = f"{number:g}"
    return re.sub(r"e\+?(-?)0*", r"e\1", text) if float(text) == number else str(number)
