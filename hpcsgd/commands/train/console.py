"""Terminal output of a run, by rank 0: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_EVERY = 5.0  # seconds


class ConsoleDisplay:
    """Displays records and messages.

    Modes are "bar", "plain", "off", and "auto": the bar if the output is a terminal.
    """

    def __init__(self, mode: str, total: int, step: int, epochs: float) -> None:
        if mode == "auto":
            mode = "bar" if sys.stdout.isatty() else "plain"
        self._mode, self._total, self._epochs = mode, total, epochs
        self._last_line = 0.0
        self._first: tuple[float, int] | None = None  # time and step of the first record
        self._console = Console(force_terminal=True if mode == "bar" else None, highlight=False)
        self._bar: Progress | None = None
        if mode == "bar":
            self._bar = Progress(
                BarColumn(None),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, completed=step)
            self._bar.start()

    def message(self, text: str) -> None:
        """Display a message, in any mode but "off"."""
        # A full disk under the output, or a closed pipe, must not end the run.
        with contextlib.suppress(OSError):
            if self._mode == "bar":
                self._console.print(text, markup=False)
            elif self._mode == "plain":
                print(text, flush=True)

    def train(self, record: dict[str, Any]) -> None:
        """Display a record of training; plain output is limited to one every few seconds."""
        text = (
            f"epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  accuracy {record['accuracy']:6.2%}  "
            f"{record['samples_per_second']:,.0f} samples/s  waiting {waiting_share(record):4.0%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            self.message(f"step {record['step']}/{self._total}{self._remaining(record['step'])}  {text}")

    def _remaining(self, step: int) -> str:
        """Return the time until the last step at the speed since the first record, from the second one on."""
        now = time.monotonic()
        if self._first is None or step <= self._first[1]:
            self._first = now, step
            return ""
        began, first = self._first
        seconds = (now - began) * (self._total - step) / (step - first)
        return f"  {timedelta(seconds=round(seconds))} left"

    def test(self, record: dict[str, Any]) -> None:
        """Display a record of an evaluation."""
        self.message(
            f"epoch {record['epoch']:.2f}/{self._epochs:g}  test loss {record['loss']:.4f}  "
            f"test accuracy {record['accuracy']:.2%}  after {record['time']:.1f} s"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def print_notice(text: str) -> None:
    """Print a line to stderr that the user must see in any mode of the display."""
    with contextlib.suppress(OSError):
        print(f"hpcsgd: {text}", file=sys.stderr, flush=True)


def waiting_share(record: dict[str, Any]) -> float:
    """Return the time that all ranks spent waiting, as a fraction of their total time."""
    wait, compute = sum(record["wait_seconds"]), sum(record["compute_seconds"])
    return float(wait / (wait + compute)) if wait + compute else 0.0
