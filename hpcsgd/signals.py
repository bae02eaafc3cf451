"""Signals that ask a run to stop: noted when they come, heeded when all ranks agree to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Signals:
    """Notes SIGTERM and SIGUSR1, and others that it is told, while it is in place.

    Parameters
    ----------
    more
        Numbers of further signals.

    Attributes
    ----------
    caught
        The last one that this process was sent, or None.
    """

    def __init__(self, *more: int) -> None:
        self._numbers = (signal.SIGTERM, signal.SIGUSR1, *more)
        self.caught: int | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, they end nothing."""

        def note(number: int, _: object) -> None:
            self.caught = number

        before = {s: signal.signal(s, note) for s in self._numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
