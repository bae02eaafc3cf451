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
    signal.signal(signal.SIGUSR1, _defer)


def _defer(number: int, _: object) -> None:
    _deferred.append(number)


def ignore_stops() -> None:
    """Ignore SIGUSR1 and SIGTERM until the process is gone: nothing is left to stop but MPI.

    Python resets its own handlers before that, but not this.
    """
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class SignalRecorder:
    """Records SIGTERM and SIGUSR1, and further signals, instead of their default action."""

    def __init__(self, *further: int) -> None:
        self._numbers = (signal.SIGTERM, signal.SIGUSR1, *further)
        self.received: int | None = None  # the last signal

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the handlers; the previous ones are restored at the end.

        Without an exception the work of the block is done and saved: a SIGTERM from then on ends no process,
        which would look like a failure, but is passed on to the next recorder.
        """

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
        signal.signal(signal.SIGTERM, _defer)
