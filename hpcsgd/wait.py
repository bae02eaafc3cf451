"""Waiting: every wait backs off, answers the other ranks' questions, and has a deadline."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable

from hpcsgd.errors import BadOption, DeadlineExceeded
from hpcsgd.tracing import Off

DEFAULT_TIMEOUT = 300.0
_SPINS = 50
_LONGEST_SPIN = 1e-3  # seconds; a test may sleep in native code itself
#: The shortest and the longest sleep in seconds, and between them the share of the wait so far.
_EAGER = (20e-6, 500e-6, 0.03)
_PATIENT = (100e-6, 3e-3, 0.15)
_LOOK_AROUND_EVERY = 0.2
_GRACE = 10.0


def timeout_from_environment() -> float:
    """The deadline of every wait in seconds: `HPCSGD_TIMEOUT`, or 300."""
    text = os.environ.get("HPCSGD_TIMEOUT", "")
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX / 2:
        raise BadOption(
            "HPCSGD_TIMEOUT is not a time",
            expected="seconds, above 0",
            got=repr(text),
            do="unset it for 300 seconds",
        )
    return seconds


class Waiter:
    """Waits for conditions on behalf of one rank.

    Parameters
    ----------
    rank
        The rank that waits, for the error.
    timeout
        Seconds until a wait is given up.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank = rank
        self.timeout = timeout
        self.look_around: Callable[[], None] = lambda: None
        self.ask_others: Callable[[], str] = lambda: ""
        #: Does a little of what goes on beside everything else, and says whether there was any.
        self.serve: Callable[[], bool] = lambda: False
        #: Whether nobody waits for what this thread waits for: to look again takes time from who computes.
        self.patient: Callable[[], bool] = lambda: False
        #: Of all that this rank does; waiting is what every part of it has at hand.
        self.trace = Off()

    def until(
        self,
        done: Callable[[], bool],
        what: str,
        missing: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        """Return once `done()` is true.

        Parameters
        ----------
        done
            Tests the condition; may itself block for a fraction of a second in native code.
        what
            The operation, for the error: "all-reduce of bucket 3, step 17".
        missing
            The ranks that are not there yet, where that is known.

        Raises
        ------
        DeadlineExceeded
            After the timeout; the message names who is missing and what every rank does.
        """
        started = time.monotonic()
        for _ in range(1 if self.patient() else _SPINS):
            if done():
                return
            if time.monotonic() - started > _LONGEST_SPIN:
                break
        os.sched_yield()
        with self.trace.span(what, "wait"):
            self._sleep_until(done, what, missing, started)

    def _sleep_until(
        self,
        done: Callable[[], bool],
        what: str,
        missing: Callable[[], Iterable[int]] | None,
        started: float,
    ) -> None:
        looked = started
        while not done():
            if self.serve():
                continue
            now = time.monotonic()
            if now - looked > _LOOK_AROUND_EVERY:
                looked = now
                self.look_around()
                self.trace.flush()
                if now - started > self.timeout:
                    raise self._late(what, missing)
            # In proportion to the wait so far: what is waited for is never noticed much too late.
            shortest, longest, share = _PATIENT if self.patient() else _EAGER
            time.sleep(min(max((now - started) * share, shortest), longest))

    def event(self, event: threading.Event, what: Callable[[], str], timeout: float | None) -> None:
        """Wait for an event that the communication thread sets.

        That thread has a deadline of its own and knows more, so this one leaves it some seconds to
        report first.
        """
        limit = self.timeout + _GRACE if timeout is None else timeout
        if not event.wait(limit):
            raise DeadlineExceeded(
                f"no end of {what()} after {limit:g} s",
                rank=self.rank,
                got="what each rank does:\n" + self.ask_others() if timeout is None else None,
                do=_REMEDY,
            )

    def _late(self, what: str, missing: Callable[[], Iterable[int]] | None) -> DeadlineExceeded:
        ranks = sorted(missing()) if missing else []
        whom = " for rank " + ", ".join(map(str, ranks)) if ranks else ""
        return DeadlineExceeded(
            f"waited {self.timeout:g} s{whom} in {what}",
            rank=self.rank,
            got="what each rank does:\n" + self.ask_others(),
            do=_REMEDY,
        )


_REMEDY = "find out why the missing rank stopped; for long pauses raise HPCSGD_TIMEOUT (seconds)"
