"""What `hpcsgd serve` shows: a line for each client, and what the server has to say."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hpcsgd.server.session import Client

_LINES_EVERY = 10.0  # seconds
_MB = 1e6
Row = dict[str, Any]


def row(client: Client) -> Row:
    """What there is to say of a client, for eyes and for a file."""
    link, pushes = client.link, client.staleness.total()
    behind = sum(updates * count for updates, count in client.staleness.items())
    return {
        "name": client.name,
        "from": "" if link is None else link.name,
        "state": _state(client),
        "pushes": pushes,
        "staleness": round(behind / pushes, 3) if pushes else 0.0,
        "longest": max(client.staleness, default=0),
        "left_out": client.left_out,
        "received": client.received + (0 if link is None else link.received),
        "sent": client.sent + (0 if link is None else link.sent),
        "silent_for": round(client.silent_for, 1),
    }


def _state(client: Client) -> str:
    if client.done:
        return "done"
    if client.link is None:
        return "gone"
    if not client.waited_for:
        return "silent"
    return "resting" if client.resting else "counts"


class Board(logging.Handler):
    """Shows rows, and as a handler of `logging` the server's messages with their time.

    Parameters
    ----------
    mode
        "live": a table that stays; "plain": a line for each client every ten seconds; "off"; or "auto": the
        table where the output is a terminal.
    prefix
        Before each message: which server says so.
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
        self._say(f"{self._prefix}{record.getMessage()}")

    def _say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {text}"
        if self._live is not None:
            self._live.console.print(line, markup=False)
        elif self._mode == "plain":
            print(line, flush=True)

    def show(self, clients: Iterable[Client]) -> None:
        """Show how the clients are, as often as the mode says."""
        if self._live is not None:
            self._live.update(_table(map(row, clients)), refresh=True)
        elif self._mode == "plain" and time.monotonic() - self._shown_at > _LINES_EVERY:
            self._shown_at = time.monotonic()
            for client in clients:
                self._say("  ".join(f"{name} {value}" for name, value in _cells(row(client)).items()))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        super().close()


def _cells(of: Row) -> dict[str, str]:
    """A row as text, by the headings of a table."""
    return {
        "client": of["name"],
        "state": of["state"],
        "pushes": f"{of['pushes']:,}",
        "staleness": f"{of['staleness']:.1f}",
        "longest": str(of["longest"]),
        "left out": f"{of['left_out']:,}",
        "MB in": f"{of['received'] / _MB:,.1f}",
        "MB out": f"{of['sent'] / _MB:,.1f}",
        "silent": f"{of['silent_for']:.1f} s",
        "from": of["from"] or "-",
    }


def _table(rows: Iterable[Row]) -> Table:
    table = Table(box=None)
    for place, of in enumerate(map(_cells, rows)):
        if place == 0:
            for heading in of:
                table.add_column(heading, no_wrap=True)
        table.add_row(*of.values())
    return table
