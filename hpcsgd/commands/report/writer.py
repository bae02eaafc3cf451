"""Writes a report: the HTML page with its figures, and the table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from hpcsgd.commands.report import html, plots
from hpcsgd.commands.report.figures import png
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.run_reader import load
from hpcsgd.commands.report.summary import cells
from hpcsgd.errors import BadOption, os_errors

_NARROW = 28  # characters of a run's name in a line of a narrow terminal, if no word is longer


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write a report on runs: the self-contained page `report.html`, and its figures as PNG files.

    A folder that is given twice counts once; `out` is created if it does not exist. Returns the files, the
    page first.

    Raises
    ------
    HpcsgdError
        A folder is not a run folder or holds a corrupt file, `out` cannot be written, or matplotlib is not
        installed.
    """
    if not paths:
        raise BadOption("no run to report on", do="give the folder of at least one run")
    runs = [load(path) for path in dict.fromkeys(Path(path).resolve() for path in paths)]
    text, figures = html.page(runs), plots.figures(runs)
    with os_errors(f"cannot write the report into {out}", do="give --out a folder that can be written"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.html").write_text(text, encoding="utf-8")
        return [out / "report.html", *(png(figure, out) for figure in figures)]


def tables(runs: Sequence[RunRecord], width: int) -> Iterator[Table]:
    """Yield the summary of the runs for a terminal: one table, or several where one would be too wide.

    No word is broken: each table has the names of the runs, and as many of the other columns as fit.
    """
    header, rows = cells(runs)
    columns = [
        (title.replace(" (", "\n("), texts)
        for title, texts in zip(header, zip(*rows, strict=True), strict=True)
    ]
    widths = [max(map(len, [*title.split("\n"), *texts])) for title, texts in columns]
    if _total(widths) > width:
        widths = [max(map(len, [*title.split(), *texts])) for title, texts in columns]
        words = [word for name in columns[0][1] for word in name.split()]
        room = width - _total([0, *widths[1:]])
        widths[0] = min(widths[0], max(room, _NARROW, *map(len, words)))
    shown = [0]
    for index in range(1, len(columns)):
        if len(shown) > 1 and _total([widths[each] for each in [*shown, index]]) > width:
            yield _table(columns, widths, shown)
            shown = [0]
        shown.append(index)
    yield _table(columns, widths, shown)


def _total(widths: Sequence[int]) -> int:
    """Width of a table with columns of these widths."""
    return sum(widths) + 3 * len(widths) + 1


def _table(
    columns: Sequence[tuple[str, Sequence[str]]], widths: Sequence[int], shown: Sequence[int]
) -> Table:
    result = Table()
    for index in shown:
        result.add_column(
            columns[index][0], justify="right" if index else "left", width=widths[index], overflow="fold"
        )
    for row in zip(*(columns[index][1] for index in shown), strict=True):
        result.add_row(*map(escape, row))
    return result
