"""Tasks: the work of the communication thread, as generators that yield what they wait for."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from hpcsgd.mpi.progress import Progress

T = TypeVar("T")

#: Seconds between two looks at a task that waits for messages, and at one that has ended.
POLL_INTERVAL, NEVER = 1e-3, math.inf


class Wait(NamedTuple):
    """Condition that a task waits for.

    Attributes
    ----------
    done
        Tests the condition; may itself block for a fraction of a second in native code.
    missing
        Returns the ranks that have not arrived yet; None: not known.
    operation, advice
        For the error at the deadline; None: the task's own, and to look for the missing rank.
    """

    done: Callable[[], bool]
    missing: Callable[[], Iterable[int]] | None = None
    operation: str | None = None
    advice: str | None = None


#: Yields a `Wait`, None to go on at once, or (a service) the seconds until it is to be resumed at the latest.
Steps = Generator[Wait | float | None, None, T]


def steps_of(job: Callable[[], T | Steps[T]]) -> Steps[T]:
    """Return the steps of a job, which is one step where it returns no steps itself."""
    result = job()
    if isinstance(result, Generator):
        return (yield from result)
    return result


def stepwise(context: Callable[[], AbstractContextManager[Any]], steps: Steps[T]) -> Steps[T]:
    """Run each step inside a context of its own: between two steps the thread does other work."""
    while True:
        with context():
            try:
                wait = next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
        yield wait


class Task:
    """Steps that are executed one at a time, by one thread at a time.

    Attributes
    ----------
    awaited
        What it waits for; None: nothing.
    done
        Whether it has ended.
    """

    def __init__(self, steps: Steps[Any]) -> None:
        self._steps = steps
        self.awaited: Wait | None = None
        self.done = False

    @property
    def name(self) -> str:
        """Name of the generator, for the trace."""
        return getattr(self._steps, "__qualname__", "")

    def advance(self) -> float:
        """Execute the next step if it can be, without waiting.

        Returns
        -------
        float
            Seconds until the next call at the latest: 0 after a step, `NEVER` after the last one.
        """
        if self.done:
            return NEVER
        if self.awaited is not None and not self.awaited.done():
            return POLL_INTERVAL
        return self.step()

    def step(self) -> float:
        """Execute the next step, whose wait is over; returns what `advance` does."""
        self.awaited = None
        try:
            found = next(self._steps)
        except StopIteration as end:
            self._end(end.value)
            return NEVER
        if isinstance(found, Wait):
            self.awaited, found = found, None
        return found or 0.0

    def close(self) -> None:
        """Leave the remaining steps out, and release what they refer to; not within a step."""
        self._steps.close()
        self.awaited, self.done = None, True

    def _end(self, result: Any) -> None:
        self.done = True


@dataclass
class Turn:
    """The turn of a task that may advance before it begins, and after it is over.

    Attributes
    ----------
    begun
        Whether all earlier tasks have ended, or their turns are over: this one may do what needs an order.
    over
        Set by the task when it does nothing any more that needs an order.
    """

    begun: bool = False
    over: bool = False


class Work(Task):
    """A task submitted to the communication thread.

    Its result is ready once `test()` is true; `wait()` returns it or raises the error of the task.
    """

    def __init__(
        self, progress: Progress, operation: str, job: Callable[[], Any], turn: Turn | None = None
    ) -> None:
        super().__init__(steps_of(job))
        self.operation, self.turn = operation, turn
        self._progress = progress
        self._ended = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def test(self) -> bool:
        """Return whether the task has ended, without waiting."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the end of the task and return its result.

        Parameters
        ----------
        timeout
            Seconds; by default the world's deadline (`HPCSGD_TIMEOUT`).

        Raises
        ------
        DeadlineExceeded
            When the timeout passes first. The task goes on.
        """
        self._finish(timeout)
        if self._error is not None:
            raise self._error
        return self._result

    def _finish(self, timeout: float | None) -> None:
        if not self._ended.is_set():
            with self._progress.waiting(self.operation):
                self._progress.waiter.event(self._ended, lambda: self.operation, timeout)

    def _end(self, result: Any) -> None:
        self._result = result
        super()._end(result)
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        """End the task by an error."""
        self._error = error
        # The steps hold the buffers; released first, they may be freed by a caller that sees the end.
        self.close()
        self._end(None)
