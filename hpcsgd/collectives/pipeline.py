"""Pipelined reduction of several buckets in one thread: coroutines that never block."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from hpcsgd.mpi.waiting import DeadlineWaiter
from hpcsgd.tensors.group import Bucket

#: A task yields None after a chunk of work, or a condition that must be true before it can continue.
Steps = Iterator[Callable[[], bool] | None]

_LOOKAHEAD = 2  # tasks that may advance before their turn


class BucketTask:
    """The reduction of one bucket, as a coroutine.

    Messages of one kind are sent in the order of the buckets on every rank: a task never sends its message
    number i before its predecessor has. It also waits until that message of the task before its predecessor
    is completed: two messages at a time fill the link, more would only delay the first.

    Parameters
    ----------
    predecessor
        The task of the preceding bucket, or None.
    number
        Position in the order of all tasks, equal on all ranks.

    Attributes
    ----------
    sent, completed
        Number of messages that have been sent, and whose result has been received.
    barriers_passed
        Number of barriers of the node that the task has passed.
    pending_sum
        A buffer that the task needs summed before it can continue; the pipeline does so in the task's turn.
    all_sent
        Whether the task has no more messages to send, and only decodes.
    done
        Whether the task is finished.
    """

    def __init__(self, predecessor: BucketTask | None, number: int) -> None:
        self._predecessor = predecessor
        self.number = number
        self._steps: Steps = iter(())
        self._ready: Callable[[], bool] | None = None
        self.sent = self.completed = self.barriers_passed = 0
        self.pending_sum: Bucket | None = None
        self.all_sent = self.done = False

    def begin(self, steps: Steps) -> None:
        """Set the coroutine of the task."""
        self._steps = steps

    def advance(self) -> bool:
        """Execute one step; returns False if the task can only wait."""
        ready = self._ready
        if (ready is not None and not ready()) or self.done:
            return False
        try:
            self._ready = next(self._steps)
        except StopIteration:
            # A reference to this task, as a predecessor, must not keep its memory alive.
            self.done, self._ready, self._predecessor, self._steps = True, None, None, iter(())
        return True

    def may_send(self) -> bool:
        """Return whether the order of messages allows the next one to be sent."""
        predecessor = self._predecessor
        if predecessor is None or predecessor.done:
            return True
        earlier = predecessor._predecessor
        may_follow = earlier is None or earlier.done or earlier.completed > self.sent
        return predecessor.sent > self.sent and may_follow

    def may_pass(self, barrier: int) -> bool:
        """Return whether the predecessor has passed a barrier."""
        predecessor = self._predecessor
        return predecessor is None or predecessor.done or predecessor.barriers_passed > barrier


class Pipeline:
    """Schedules the bucket tasks of a world, in one order: the next ones encode while the last ones decode.

    Parameters
    ----------
    waiter
        Waits with a deadline.
    context
        Context in which tasks are executed, such as the stream of a GPU.
    """

    def __init__(self, waiter: DeadlineWaiter, context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._waiter, self._context = waiter, context
        self._encoding: deque[BucketTask] = deque()
        self._decoding: deque[BucketTask] = deque()
        self._last: BucketTask | None = None

    def add(self, coroutine: Callable[[BucketTask], Steps]) -> BucketTask:
        """Add a task, which executes `coroutine`; tasks take their turns in the order of these calls."""
        self._last = task = BucketTask(self._last, 0 if self._last is None else self._last.number + 1)
        task.begin(coroutine(task))
        self._encoding.append(task)
        return task

    def run_to_turn(self, task: BucketTask, operation: str, sum_buffer: Callable[[Bucket], None]) -> None:
        """Run the task whose turn it is to its end, or until only decoding is left and another task waits.

        Parameters
        ----------
        task
            The first of the tasks that have not had their turn.
        operation
            Name of the operation, for errors.
        sum_buffer
            Sums the task's `pending_sum` over the ranks; may block, and call `poll` while it does.
        """
        self._encoding.popleft()
        with self._context():
            while not task.done:
                if task.pending_sum is not None:
                    sum_buffer(task.pending_sum)
                    task.pending_sum = None
                if task.all_sent and self._encoding:
                    self._decoding.append(task)
                    return
                self._waiter.until(lambda: self._advance_or_poll(task), operation)
            while not self._encoding and self._decoding:
                self._decode_step()

    def complete(self, task: BucketTask) -> None:
        """Decode all tasks up to one that has had its turn."""
        with self._context():
            while not task.done:
                self._decode_step()

    def poll(self) -> bool:
        """Advance one task before or after its turn by one step; returns False if none can advance."""
        # Looks at few tasks: where ranks share cores, the time of a poll is taken from ranks that compute.
        for task in list(self._encoding)[:_LOOKAHEAD]:
            if task.advance():
                return True
        return self._decode_step()

    def _advance_or_poll(self, task: BucketTask) -> bool:
        while not task.advance():
            if task.pending_sum is not None:
                return True
            if not self.poll():
                return False
        return True

    def _decode_step(self) -> bool:
        while self._decoding and self._decoding[0].done:
            self._decoding.popleft()
        return bool(self._decoding) and self._decoding[0].advance()
