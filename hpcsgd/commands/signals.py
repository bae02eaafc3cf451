"""Signals that ask a run to stop: recorded on arrival, acted upon when all ranks have exchanged them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_deferred: list[int] = []


def defer_sigusr1() -> None:
    """Ignore the default action of SIGUSR1, and pass the signal on to the next `SignalRecorder.installed`.

    A batch system may warn of the time limit while a job is still starting.
    """
    signal.signal(signal.SIGUSR1, lambda number, _: _deferred.append(number))


def ignore_sigusr1() -> None:
    """Ignore SIGUSR1 until the process is gone: nothing is left to stop, and MPI is still to be finalised.

    Python resets its own handlers before that, but not this.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class SignalRecorder:
    """Records SIGTERM and SIGUSR1, and further signals, instead of their default action.

    Parameters
    ----------
    further
        Numbers of further signals.

    Attributes
    ----------
    received
        Number of the last signal that this process received, or None.
    """

    def __init__(self, *further: int) -> None:
        self._numbers = (signal.SIGTERM, signal.SIGUSR1, *further)
        self.received: int | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the handlers; the previous ones are restored at the end."""

        def record(number: int, _: object) -> None:
            self.received = number

        before = {s: signal.signal(s, record) for s in self._numbers}
        if _deferred:
            self.received = _deferred[-1]
            _deferred.clear()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
