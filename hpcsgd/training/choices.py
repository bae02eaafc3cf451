"""Options of `Run` that are one of a few words."""

from __future__ import annotations

from hpcsgd import collectives
from hpcsgd.errors import BadOption

_CHOICES = {
    "algorithm": ("auto", *collectives.ALGORITHMS),
    "buffers": ("broadcast", "average", "local"),
    "nonfinite": ("error", "skip"),
    "sparse": ("rows", "dense"),
    "uneven": ("join", "stop"),
    "unused": ("zeros", "error"),
    "wait": ("backward", "step"),
}


def check_choices(**options: str) -> None:
    """Raise `BadOption` for a value that does not exist."""
    for option, value in options.items():
        if value not in _CHOICES[option]:
            raise BadOption(f"unknown {option} {value!r}", do="use one of: " + ", ".join(_CHOICES[option]))
