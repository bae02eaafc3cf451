"""Tasks: the work of the communication thread, as generators that yield what they wait for."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

#: Seconds between two looks at a task that waits for messages, and at one that has ended.
POLL_INTERVAL, NEVER = 1e-3, math.inf


class Wait(NamedTuple):
    """What a task waits for.

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

    def _end(self, result: Any) -> None:
        self.done = True
