"""Signals that ask a run to stop: noted when they come, heeded when all ranks agree to."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_kept: list[int] = []


def keep() -> None:
    """From now on SIGUSR1 ends nothing, and is kept for the next `Signals.noted`.

    A batch system may warn of the time limit while a job still starts.
    """
    signal.signal(signal.SIGUSR1, lambda number, _: _kept.append(number))


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
        if _kept:
            self.caught = _kept[-1]
            _kept.clear()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
