"""Console output of `hpcsgd serve`: a table or lines of the clients, and log messages."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hpcsgd.server.session import Session

_LINE_INTERVAL = 10.0  # seconds
_MB = 1e6
Row = dict[str, Any]


def session_row(session: Session) -> Row:
    """State of a client, for the table and for `metrics.jsonl`."""
    link, pushes = session.link, session.staleness.total()
    missed = sum(updates * count for updates, count in session.staleness.items())
    return {
        "name": session.name,
        "from": "" if link is None else link.name,
        "state": _state(session),
        "pushes": pushes,
        "staleness": round(missed / pushes, 3) if pushes else 0.0,
        "longest": max(session.staleness, default=0),
        "left_out": session.dropped,
        "received": session.received + (0 if link is None else link.received),
        "sent": session.sent + (0 if link is None else link.sent),
        "silent_for": round(session.silent_for, 1),
    }


def _state(session: Session) -> str:
    if session.done:
        return "done"
    if session.link is None:
        return "gone"
    if not session.alive:
        return "silent"
    return "resting" if session.paused else "counts"


class ServerDashboard(logging.Handler):
    """Live table of a server's clients, and `logging` handler for the server's messages.

    Parameters
    ----------
    mode
        "live": a table that is updated; "plain": a line for each client every ten seconds; "off"; or "auto":
        live if the output is a terminal, else plain.
    prefix
        Name of the server, before each message. Default "".
    """

    def __init__(self, mode: str, prefix: str = "") -> None:
        super().__init__(logging.INFO)
        if mode == "auto":
            mode = "live" if sys.stdout.isatty() else "plain"
        self._mode, self._prefix = mode, prefix
        self._live = Live(console=Console(highlight=False), auto_refresh=False) if mode == "live" else None
        self._shown_at = time.monotonic()
        if self._live is not None:
            self._live.start()

    def emit(self, record: logging.LogRecord) -> None:
        self._print(f"{self._prefix}{record.getMessage()}")

    def _print(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        if self._live is not None:
            self._live.console.print(line, markup=False)
        elif self._mode == "plain":
            print(line, flush=True)

    def show(self, sessions: Iterable[Session]) -> None:
        """Show the state of the clients, at the interval of the mode."""
        if self._live is not None:
            self._live.update(_table(map(session_row, sessions)), refresh=True)
        elif self._mode == "plain" and time.monotonic() - self._shown_at > _LINE_INTERVAL:
            self._shown_at = time.monotonic()
            for session in sessions:
                cells = _cells(session_row(session))
                self._print("  ".join(f"{name} {value}" for name, value in cells.items()))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        super().close()


def _cells(row: Row) -> dict[str, str]:
    """Cells of a row, by the headings of the table."""
    return {
        "client": row["name"],
        "state": row["state"],
        "pushes": f"{row['pushes']:,}",
        "staleness": f"{row['staleness']:.1f}",
        "longest": str(row["longest"]),
        "left out": f"{row['left_out']:,}",
        "MB in": f"{row['received'] / _MB:,.1f}",
        "MB out": f"{row['sent'] / _MB:,.1f}",
        "silent": f"{row['silent_for']:.1f} s",
        "from": row["from"] or "-",
    }


def _table(rows: Iterable[Row]) -> Table:
    table = Table(box=None)
    for index, row in enumerate(map(_cells, rows)):
        if index == 0:
            for heading in row:
                table.add_column(heading, no_wrap=True)
        table.add_row(*row.values())
    return table
