"""Waiting: every wait backs off, answers the other ranks' questions, and has a deadline."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hpcsgd.diagnostics.trace import Off
from hpcsgd.errors import BadOption, DeadlineExceeded, in_words

DEFAULT_TIMEOUT = 300.0
_SPINS = 50
_LONGEST_SPIN = 1e-3  # seconds; a test may sleep in native code itself
#: The shortest and the longest sleep in seconds, and between them the share of the wait so far.
_EAGER = (20e-6, 500e-6, 0.03)
_PATIENT = (100e-6, 3e-3, 0.15)
_LOOK_AROUND_EVERY = 0.2
_GRACE = 10.0
_WARN_AFTER = (0.25, 30.0)  # of the deadline, and no fewer seconds than this


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


@dataclass(frozen=True)
class Waiting:
    """A wait that goes on, or was given up: for what, for how many seconds, and for which ranks if known."""

    what: str
    seconds: float
    ranks: tuple[int, ...] = ()


class Waiter:
    """Waits for conditions on behalf of one rank.

    Parameters
    ----------
    rank
        The rank that waits, for the error.
    timeout
        Seconds until a wait is given up.

    Attributes
    ----------
    warn_after
        Seconds until a wait is worth a warning: a quarter of the timeout, but at least 30.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank = rank
        self.timeout = timeout
        self.look_around: Callable[[], None] = lambda: None
        #: What each rank does, once this one has waited for so many seconds; None where another rank tells.
        self.explain: Callable[[float], str | None] = lambda seconds: ""
        #: Tells of such a wait before its end; False where there is nothing to tell yet.
        self.warn: Callable[[float], bool] = lambda seconds: True
        self.warn_after = max(_WARN_AFTER[0] * timeout, _WARN_AFTER[1])
        self._notes: dict[int, tuple[str, float, _Missing]] = {}
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
        missing: _Missing = None,
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
        if not done():
            with self._noted(what, started, missing), self.trace.span(what, "wait"):
                self._sleep_until(done, started)

    def _sleep_until(self, done: Callable[[], bool], started: float) -> None:
        looked, warn_at = started, started + self.warn_after
        while not done():
            if self.serve():
                continue
            now = time.monotonic()
            if now - looked > _LOOK_AROUND_EVERY:
                looked = now
                self.look_around()
                self.trace.flush()
                if now - started > self.timeout:
                    raise self._late(now - started, self.timeout)
                if now > warn_at:
                    warn_at = math.inf if self.warn(now - started) else now + self.warn_after
            # In proportion to the wait so far: what is waited for is never noticed much too late.
            shortest, longest, share = _PATIENT if self.patient() else _EAGER
            time.sleep(min(max((now - started) * share, shortest), longest))

    def event(self, event: threading.Event, what: Callable[[], str], timeout: float | None) -> None:
        """Wait for an event that the communication thread sets.

        That thread has a deadline of its own and knows more, so this one leaves it some seconds to
        report first.
        """
        limit = self.timeout + _GRACE if timeout is None else timeout
        started = time.monotonic()
        if event.wait(min(limit, _LOOK_AROUND_EVERY)):
            return
        with self._noted(what(), started, None):
            while not event.wait(min(max(started + limit - time.monotonic(), 0.0), _LOOK_AROUND_EVERY)):
                # That thread may be in native code.
                self.look_around()
                waited = time.monotonic() - started
                if waited > limit:
                    raise self._late(waited, limit) if timeout is None else self._expired(what(), timeout)

    def waits(self) -> tuple[Waiting, ...]:
        """The waits of all threads that last, and those that were given up."""
        now = time.monotonic()
        notes = self._notes.copy().values()
        return tuple(Waiting(what, now - started, _ranks(missing)) for what, started, missing in notes)

    @contextmanager
    def _noted(self, what: str, started: float, missing: _Missing) -> Iterator[None]:
        thread, given_up = threading.get_ident(), False
        self._notes[thread] = (what, started, missing)
        try:
            yield
        except DeadlineExceeded:
            # Who comes to this end a moment later asks what this rank waited for.
            given_up = True
            raise
        finally:
            if not given_up:
                self._notes.pop(thread, None)

    def _late(self, waited: float, limit: float) -> DeadlineExceeded:
        what, _, missing = self._notes[threading.get_ident()]
        ranks, told = _ranks(missing), self.explain(waited)
        return DeadlineExceeded(
            f"waited {limit:g} s" + (f" for {in_words(ranks)}" if ranks else "") + f" in {what}",
            rank=self.rank,
            got="what each rank does is told by another rank" if told is None else told or None,
            do="find out why the missing rank stopped; for long pauses raise HPCSGD_TIMEOUT (seconds)",
            elsewhere=told is None,
        )

    def _expired(self, what: str, timeout: float) -> DeadlineExceeded:
        return DeadlineExceeded(f"no end of {what} after {timeout:g} s", rank=self.rank)


_Missing = Callable[[], Iterable[int]] | None


def _ranks(missing: _Missing) -> tuple[int, ...]:
    # Asked by another thread the wait may just come to its end.
    with contextlib.suppress(Exception):
        return tuple(sorted(missing())) if missing else ()
    return ()
