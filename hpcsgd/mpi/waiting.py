"""Waits with a deadline: each backs off, serves the other ranks' requests, and ends in an error that names
the missing ranks."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from hpcsgd.diagnostics.trace import NullTracer
from hpcsgd.errors import DeadlineExceeded, format_ranks
from hpcsgd.mpi.tasks import Steps, T, Wait

_SPINS = 50
_LONGEST_SPIN = 1e-3  # seconds; a test may sleep in native code itself
#: The shortest and the longest sleep in seconds, and between them the share of the wait so far.
_FOREGROUND = (20e-6, 500e-6, 0.03)
_BACKGROUND = (100e-6, 3e-3, 0.15)
_CHECK_INTERVAL = 0.2
_GRACE = 10.0
_WARN_AFTER = (0.25, 30.0)  # of the deadline, and no fewer seconds than this
_COMPARE_AFTER = 1.5  # seconds, doubled at each comparison
_BUSY_INTERVAL = 10.0  # seconds between two looks at a busy rank
_ADVICE = "find out why the missing rank stopped"

_Missing = Callable[[], Iterable[int]] | None


def _other_thread() -> Iterable[int]:
    return ()  # the other thread waits for the ranks, and knows them


@dataclass(frozen=True)
class PendingWait:
    """A wait that lasts, or was given up: its operation, seconds so far, and the missing ranks if known."""

    operation: str
    seconds: float
    ranks: tuple[int, ...] = ()


class Explanation(NamedTuple):
    """Why a wait lasts: the state of each rank, and the ranks for which the others wait, if known.

    `elsewhere` is true where another rank prints it first.
    """

    report: str = ""
    blocking: tuple[int, ...] = ()
    elsewhere: bool = False


@dataclass(frozen=True)
class WaitHooks:
    """Callbacks of a wait; each default does nothing.

    Attributes
    ----------
    check
        Called a few times a second: exchanges control messages, and raises where ranks have failed.
    answer
        Answers the requests of other ranks.
    poll
        Does a little of the rank's background communication; returns whether there was any.
    is_background
        Returns whether no thread depends on this one's wait: it then polls less often, for polling takes time
        from the compute thread.
    explain
        Takes the seconds waited.
    warn
        Takes the seconds waited; reports the wait before its deadline. False where there is nothing to report
        yet.
    compare
        Takes the seconds waited; raises where the ranks are at places in their programs that never meet.
    is_busy
        Returns whether a rank is alive and busy, so that the others wait beyond their deadline.
    """

    check: Callable[[], None] = lambda: None
    answer: Callable[[], None] = lambda: None
    poll: Callable[[], bool] = lambda: False
    is_background: Callable[[], bool] = lambda: False
    explain: Callable[[float], Explanation] = lambda seconds: Explanation()
    warn: Callable[[float], bool] = lambda seconds: True
    compare: Callable[[float], None] = lambda seconds: None
    is_busy: Callable[[], bool] = lambda: False


class DeadlineWaiter:
    """Waits for conditions, for both threads of one rank.

    Parameters
    ----------
    rank
        This rank, for errors.
    timeout
        Seconds until a wait fails.

    Attributes
    ----------
    hooks
        Callbacks of each wait.
    tracer
        Records each wait, and all other events of this rank.
    warn_after
        Seconds until a wait is reported: a quarter of the timeout, but at least 30.
    """

    def __init__(self, rank: int, timeout: float) -> None:
        self.rank = rank
        self.timeout = timeout
        self.hooks = WaitHooks()
        self.tracer = NullTracer()
        self.warn_after = max(_WARN_AFTER[0] * timeout, _WARN_AFTER[1])
        self._pending: dict[int, tuple[str, float, _Missing]] = {}

    def until(
        self,
        done: Callable[[], bool],
        operation: str,
        missing: _Missing = None,
        advice: str = _ADVICE,
    ) -> None:
        """Return once `done()` is true.

        Parameters
        ----------
        done
            Tests the condition; may itself block for a fraction of a second in native code.
        operation
            The operation, for the error: "all-reduce of bucket 3, step 17".
        missing
            Returns the ranks that have not arrived yet, where that is known.
        advice
            What to do after the timeout. Default: look for the missing rank.

        Raises
        ------
        DeadlineExceeded
            After the timeout; the message names the missing ranks and the state of every rank.
        """
        started = time.monotonic()
        for _ in range(1 if self.hooks.is_background() else _SPINS):
            if done():
                return
            if time.monotonic() - started > _LONGEST_SPIN:
                self.hooks.answer()  # a further look may last again
                break
        os.sched_yield()
        if not done():
            with self._recorded(operation, started, missing), self.tracer.span(operation, "wait"):
                self._sleep_until(done, started, advice)

    def until_end_of(self, wait: Wait, operation: str) -> None:
        """Return once what a task waits for is true; see `until`."""
        self.until(wait.done, wait.operation or operation, wait.missing, wait.advice or _ADVICE)

    def complete(self, job: Callable[[], T | Steps[T]], operation: str) -> T:
        """Execute a job in the calling thread, with all its steps, and return its result."""
        steps = job()
        if not isinstance(steps, Generator):
            return steps
        try:
            while True:
                wait = next(steps)
                # Without the first look here a small all-reduce takes a tenth longer.
                if isinstance(wait, Wait) and not wait.done():
                    self.until_end_of(wait, operation)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def _sleep_until(self, done: Callable[[], bool], started: float, advice: str) -> None:
        checked, warn_at = started, started + self.warn_after
        compare_at, deadline = started + _COMPARE_AFTER, _Deadline(self, started, self.timeout)
        while not done():
            self.hooks.answer()
            if self.hooks.poll():
                continue
            now = time.monotonic()
            if now - checked > _CHECK_INTERVAL:
                checked = now
                self.hooks.check()
                self.tracer.flush()
                if now > compare_at:
                    compare_at = started + 2 * (now - started)
                    self.hooks.compare(now - started)
                if deadline.has_passed(now):
                    raise self._deadline_error(now - started, self.timeout, advice)
                if now > warn_at:
                    warn_at = math.inf if self.hooks.warn(now - started) else now + self.warn_after
            # In proportion to the wait so far: the relative delay of noticing its end is bounded.
            shortest, longest, share = _BACKGROUND if self.hooks.is_background() else _FOREGROUND
            time.sleep(min(max((now - started) * share, shortest), longest))

    def event(self, event: threading.Event, operation: Callable[[], str], timeout: float | None) -> None:
        """Wait for an event that the communication thread sets.

        That thread has a deadline of its own and can name the missing ranks, so this wait lasts some seconds
        longer, for that thread to report first.
        """
        limit = self.timeout + _GRACE if timeout is None else timeout
        started = time.monotonic()
        deadline = _Deadline(self, started, limit)
        if event.wait(min(limit, _CHECK_INTERVAL)):
            return
        with self._recorded(operation(), started, _other_thread):
            while not event.wait(deadline.pause(time.monotonic())):
                # The communication thread may be in native code, and check nothing.
                self.hooks.check()
                waited = time.monotonic() - started
                if deadline.has_passed(started + waited):
                    if timeout is None:
                        raise self._deadline_error(waited, limit)
                    raise DeadlineExceeded(f"no end of {operation()} after {timeout:g} s", rank=self.rank)

    def waits_for(self) -> tuple[float, set[int] | None] | None:
        """Return when the calling thread's wait began (`time.monotonic`), and the ranks, None if unknown.

        None where it does not wait.
        """
        _, started, missing = self._pending.get(threading.get_ident(), ("", 0.0, None))
        return (started, None if missing is None else set(_ranks(missing))) if started else None

    def pending(self) -> tuple[PendingWait, ...]:
        """Return the waits of all threads that last, and those that were given up."""
        now = time.monotonic()
        waits = self._pending.copy().values()
        return tuple(
            PendingWait(operation, now - started, _ranks(missing)) for operation, started, missing in waits
        )

    @contextmanager
    def _recorded(self, operation: str, started: float, missing: _Missing) -> Iterator[None]:
        thread, given_up = threading.get_ident(), False
        self._pending[thread] = (operation, started, missing)
        try:
            yield
        except DeadlineExceeded:
            # Ranks whose deadlines pass a moment later still query this wait.
            given_up = True
            raise
        finally:
            if not given_up:
                self._pending.pop(thread, None)

    def _deadline_error(self, waited: float, limit: float, advice: str = _ADVICE) -> DeadlineExceeded:
        operation, _, missing = self._pending[threading.get_ident()]
        ranks, (report, blocking, elsewhere) = _ranks(missing), self.hooks.explain(waited)
        if missing is None:  # a collective of MPI's own, which does not report who has not come
            ranks = blocking
        return deadline_error(self.rank, limit, ranks, operation, report, elsewhere, advice)


def deadline_error(
    rank: int,
    limit: float,
    missing: Sequence[int],
    operation: str,
    report: str,
    elsewhere: bool = False,
    advice: str = _ADVICE,
) -> DeadlineExceeded:
    """Return the error of a rank whose wait has lasted for `limit` seconds.

    Parameters
    ----------
    rank, limit
        The rank, and its deadline.
    missing, operation
        The ranks for which it waits, as far as they are known, and in which operation.
    report, elsewhere
        See `Explanation`.
    advice
        What to do.
    """
    return DeadlineExceeded(
        f"waited {limit:g} s" + (f" for {format_ranks(missing)}" if missing else "") + f" in {operation}",
        rank=rank,
        got=report or None,
        do=f"{advice}; to wait longer raise --timeout or HPCSGD_TIMEOUT (seconds)",
        elsewhere=elsewhere,
    )


class _Deadline:
    """The deadline of a wait, which a busy rank postpones.

    Parameters
    ----------
    waiter
        The waits of this rank.
    started, limit
        The begin of the wait, of `time.monotonic`, and its seconds.
    """

    def __init__(self, waiter: DeadlineWaiter, started: float, limit: float) -> None:
        self._waiter, self._limit = waiter, limit
        self._end, self._busy_at = started + limit, -math.inf

    def pause(self, now: float) -> float:
        """Return the seconds until the next look at the clock."""
        return min(max(self._end - now, 1e-3), _CHECK_INTERVAL)

    def has_passed(self, now: float) -> bool:
        """Return whether the wait must end; asks the other ranks at the deadline."""
        if now <= self._end:
            return False
        if self._waiter.hooks.is_busy():
            self._busy_at, self._end = now, now + min(self._limit, _BUSY_INTERVAL)
        else:
            self._end = max(self._end, self._busy_at + self._limit)
        return now > self._end


def _ranks(missing: _Missing) -> tuple[int, ...]:
    # Called from another thread, the wait may just end and its state be gone.
    with contextlib.suppress(Exception):
        return tuple(sorted(missing())) if missing else ()
    return ()
