"""Writes a report: the HTML page with its figures, and the table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from hpcsgd.commands.report import html, plots
from hpcsgd.commands.report.figures import png
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.run_reader import load
from hpcsgd.commands.report.summary import cells
from hpcsgd.errors import BadOption, os_errors


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write a report on runs: the self-contained page `report.html`, and its figures as PNG files.

    Parameters
    ----------
    paths
        The run folders, at least one; a folder given twice counts once.
    out
        The folder to write into; created if it does not exist.

    Returns
    -------
    list of Path
        The files written, the page first.

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


def table(runs: Sequence[RunRecord]) -> Table:
    """The summary of the runs as a table for the terminal."""
    header, rows = cells(runs)
    result = Table()
    for index, name in enumerate(header):
        result.add_column(name.replace(" (", "\n("), justify="right" if index else "left", overflow="fold")
    for row in rows:
        result.add_row(*map(escape, row))
    return result
