"""Layout of the page: facts by check, then the mistakes with their fixes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import click

from hpcsgd.commands.doctor.check import Finding

WIDTH = 110
_MARGIN = 12
_COLORS = {"error": "red", "warning": "yellow"}


def lines(title: str, checked: Mapping[str, Sequence[str]], findings: Iterable[Finding]) -> Iterable[str]:
    """The lines of the page, with colors, which `click.echo` removes if the output is not a terminal."""
    yield click.style(title, bold=True)
    yield ""
    for name, texts in checked.items():
        for number, text in enumerate(filter(None, texts)):
            yield from _wrapped("" if number else name, text)
    yield ""
    ordered = sorted(findings, key=lambda finding: finding.level)
    if not ordered:
        yield "Found: no mistakes"
        return
    yield "Found:"
    for finding in ordered:
        head, *rest = _wrapped(f"  {finding.level}", finding.problem)
        yield click.style(head, fg=_COLORS[finding.level])
        yield from rest
        yield from _wrapped("    fix", finding.fix)


def _wrapped(name: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=name.ljust(_MARGIN),
        subsequent_indent=" " * (_MARGIN + 2),
        break_on_hyphens=False,
        break_long_words=False,
    )
