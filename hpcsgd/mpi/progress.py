"""The communication thread: executes a queue of tasks, in an order that all ranks share, and services."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from hpcsgd.diagnostics.activity import ActivityRecord
from hpcsgd.errors import DeadlineExceeded, HpcsgdError, RankFailed
from hpcsgd.mpi.departure import Departure
from hpcsgd.mpi.tasks import POLL_INTERVAL, Steps, Task, Turn, Wait, Work
from hpcsgd.mpi.waiting import DeadlineWaiter

# Seconds, all of them.
_IDLE_CHECK_INTERVAL = 0.25
_BUSY_CHECK_INTERVAL = 2.0  # a thread that is never idle checks on other ranks after this long
_ABANDON_TIMEOUT = 10.0  # for a job to detect that ranks have failed
_AHEAD = 2  # tasks that may advance before their turn


class Progress:
    """Executes the communication of one rank.

    Parameters
    ----------
    waiter
        The waits of this rank.
    activity
        Records the current operation, for stall reports.
    threaded
        False executes every job at once in the caller (MPI below `MPI_THREAD_MULTIPLE`).

    Attributes
    ----------
    busy_seconds
        Seconds spent in jobs.
    wait_seconds
        Seconds that the compute thread has waited for communication.
    """

    def __init__(self, waiter: DeadlineWaiter, activity: ActivityRecord, *, threaded: bool) -> None:
        self.waiter = waiter
        self.activity = activity
        self.threaded = threaded
        self.busy_seconds = 0.0
        self.wait_seconds = 0.0
        self._queue: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        #: Of the tasks with a `Turn`: those before it, and those whose turn is over.
        self._early: deque[Work] = deque()
        self._late: deque[Work] = deque()
        self._count = threading.Lock()
        self._unfinished = 0
        self._failed: BaseException | None = None
        self._failed_at: TracebackType | None = None
        self._thread: threading.Thread | None = None
        self._services: list[Task] = []
        self._serving = threading.Lock()
        self._compute_waits = False
        self._checked = time.perf_counter()
        self._departure: Departure | None = None
        self._stopping = threading.Event()

    def require_thread_multiple(self, problem: str) -> None:
        """Raise this problem on all ranks where communication has no thread of its own."""
        if not self.threaded:
            raise HpcsgdError(
                problem,
                expected="MPI_THREAD_MULTIPLE",
                got="an MPI library that provides less",
                do="use an MPI library that provides MPI_THREAD_MULTIPLE, or a synchronous "
                "method: --strategy local",
                everywhere=True,
            )

    def serve(self, steps: Steps[None]) -> Task:
        """Execute the steps of a service, by one thread at a time: while no task can go on, and in waits."""
        service = Task(steps)
        with self._serving:
            self._services.append(service)
        self.poll_now()
        return service

    def stop_serving(self, service: Task) -> None:
        """End a service; on return no step of it is in progress."""
        with self._serving:
            self._services = [each for each in self._services if each is not service]
            service.close()  # its owner refers to it, and its steps to the owner

    @property
    def is_serving(self) -> bool:
        """Whether there are services that have not ended."""
        return bool(self._services)

    def poll_now(self) -> None:
        """Make the idle thread advance all services now, before their intervals have passed."""
        self.submit("a call of the services", lambda: None)

    def poll(self) -> bool:
        """Advance all services once, unless the other thread does; return whether one could go on."""
        return self._poll() == 0

    def _poll(self) -> float:
        if not self._serving.acquire(blocking=False):
            return POLL_INTERVAL  # the other thread advances them
        try:
            pauses = [self._advance(service) for service in self._services]
            self._services = [service for service in self._services if not service.done]
            return min(pauses, default=_IDLE_CHECK_INTERVAL)
        finally:
            self._serving.release()

    def _advance(self, service: Task) -> float:
        try:
            with self.waiter.tracer.span(service.name, "service"):
                return service.advance()
        except BaseException as error:
            self._fail(error)  # the service has ended: later operations could wait for it for ever
            raise

    def submit(self, operation: str, job: Callable[[], Any], turn: Turn | None = None) -> Work:
        """Queue a task; every rank must submit the same tasks in the same order.

        Parameters
        ----------
        operation
            Name of the task, for errors.
        job
            Called in its turn; returns its result, or its steps.
        turn
            For a task that may advance before its turn and after it. Default: it does not.
        """
        if self._departure is not None:
            self.check()
        work = Work(self, operation, job, turn)
        with self._count:
            self._unfinished += 1
            if self.threaded:
                if turn is not None:
                    self._early.append(work)
                self._queue.put(work)
        if self.threaded:
            self.start()
        else:
            self._take_turn(work)
        return work

    def _count_end(self) -> None:
        with self._count:
            self._unfinished -= 1

    def start(self) -> None:
        """Start the communication thread, which also serves other ranks' requests while it is idle."""
        if self.threaded and self._thread is None:
            self._thread = threading.Thread(target=self._execute_queue, name="hpcsgd", daemon=True)
            self._thread.start()

    def run(self, operation: str, job: Callable[[], Any]) -> Any:
        """Execute a task and return its result; in the calling thread where the queue is empty.

        The order is the same as with `submit`, and a small task is spared two changes of thread. A step may
        run another task, which is then a part of it.
        """
        if self.in_communication_thread():
            return self.waiter.complete(job, operation)
        if self._unfinished:
            return self.submit(operation, job).wait()
        # No context managers here: a small all-reduce takes microseconds.
        started, self._compute_waits = time.perf_counter(), True
        try:
            return self._execute(operation, lambda: self.waiter.complete(job, operation))
        finally:
            self._compute_waits = False
            self.wait_seconds += time.perf_counter() - started

    def leave(self, departure: Departure) -> None:
        """Leave once the queue is empty, in the communication thread if there is one; never waits.

        Nothing can be submitted afterwards.
        """
        self._departure = departure
        departure.has_thread = self._thread is not None
        self._queue.put(None)

    def in_communication_thread(self) -> bool:
        """Return whether the caller is the communication thread."""
        return threading.current_thread() is self._thread

    def in_background(self) -> bool:
        """Return whether this is the communication thread and the compute thread does not wait for it."""
        return not self._compute_waits and self.in_communication_thread()

    def check(self) -> None:
        """Raise the error of a failed task or service, or that this rank has left."""
        if self._departure is not None and not self.in_communication_thread():
            raise self._departure.error()
        if self._failed is not None:
            raise self._failed.with_traceback(self._failed_at)  # its own: each raise adds frames

    def until(
        self, done: Callable[[], bool], operation: str, missing: Callable[[], Iterable[int]] | None = None
    ) -> None:
        """Wait in the compute thread for a result of services and tasks; raises the error of a failed one.

        Parameters
        ----------
        done, operation, missing
            As for `DeadlineWaiter.until`.
        """
        with self.waiting(operation):
            self.waiter.until(lambda: self._failed is not None or done(), operation, missing)
        self.check()

    @contextmanager
    def waiting(self, operation: str) -> Iterator[None]:
        """Count and trace the time inside as a wait of the compute thread."""
        if self._departure is not None:
            self.check()
        with self._counted(), self.waiter.tracer.span(operation, "wait"):
            yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started, self._compute_waits = time.perf_counter(), True
        try:
            yield
        finally:
            self._compute_waits = False
            self.wait_seconds += time.perf_counter() - started

    def drain(self, timeout: float | None = None) -> None:
        """Wait until every task submitted so far has ended; an error is raised by its `Work` only."""
        if self._unfinished:
            self.submit("the outstanding jobs", lambda: None)._finish(timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Complete the queue and end the thread."""
        if self._thread is None:
            return
        if self._departure is None:
            self.drain(timeout)
            self._queue.put(None)
        self._stopping.set()
        limit = self.waiter.timeout if timeout is None else timeout
        self._thread.join(limit)
        if self._thread.is_alive() and self._departure is not None:
            raise DeadlineExceeded(f"no end of the outstanding jobs after {limit:g} s", rank=self.waiter.rank)
        self._thread = None

    def release(self) -> None:
        """Forget what refers to buffers: the error of a failed task, services, and tasks they have queued."""
        self._failed = self._failed_at = None
        self._services.clear()
        self._early.clear()
        self._late.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()

    def abandon(self) -> None:
        """End the thread without its jobs: after ranks have failed, their communication never completes."""
        self._failed = self._failed or RankFailed("a rank of this job has died")
        self._services.clear()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(_ABANDON_TIMEOUT)

    def _execute_queue(self) -> None:
        while True:
            work = self._next_work()
            if work is None:
                if self._departure is not None:
                    self._services.clear()
                    self._departure.run(self._stopping.is_set)
                return
            self._take_turn(work)
            # An idle thread that still held the last task would keep its buffers alive.
            del work

    def _next_work(self) -> Work | None:
        """The next task; until there is one, serves other ranks' requests and advances services."""
        checked = time.monotonic()
        while True:
            pause = min(self._poll_or_fail(), _IDLE_CHECK_INTERVAL)
            try:
                return self._queue.get(timeout=pause) if pause else self._queue.get_nowait()
            except queue.Empty:
                if time.monotonic() - checked > _IDLE_CHECK_INTERVAL / 2:
                    self._check_or_fail()
                    checked = time.monotonic()

    def _take_turn(self, work: Work) -> None:
        """Execute a task to its end, or until its turn is over and another one waits that may advance."""
        if work.turn is not None and self.threaded:
            self._early.remove(work)
        try:
            self._execute(work.operation, lambda: self._advance_in_turn(work))
        except BaseException as error:
            for each in (work, *self._late):
                if not each.done:
                    each.fail(error)
                self._count_end()
            self._late.clear()
            return
        if work.done:
            self._count_end()
        else:
            self._late.append(work)

    def _advance_in_turn(self, work: Work) -> None:
        turn = work.turn
        if turn is None:
            self._end_late()  # this one may wait for them
        else:
            turn.begun = True
        while not work.done and not (turn is not None and turn.over and self._early):
            if work.awaited is not None:
                self._wait_for(work.awaited, work.operation)
            work.step()
        if not self._early:
            self._end_late()

    def _wait_for(self, wait: Wait, operation: str) -> None:
        """Wait in the turn of a task; tasks before and after theirs advance meanwhile."""

        def has_ended() -> bool:
            while not wait.done():
                if not self._advance_others():
                    return False
            return True

        self.waiter.until_end_of(wait._replace(done=has_ended), operation)

    def _advance_others(self) -> bool:
        """Advance one task before or after its turn by one step; returns False if none can advance."""
        # Looks at few tasks: where ranks share cores, the time of a look is taken from ranks that compute.
        for work in list(self._early)[:_AHEAD]:
            if work.advance() == 0:
                return True
        return self._advance_late()

    def _advance_late(self) -> bool:
        if not self._late or self._late[0].advance() == POLL_INTERVAL:
            return False
        if self._late[0].done:
            self._late.popleft()
            self._count_end()
        return True

    def _end_late(self) -> None:
        while self._late:
            awaited = self._late[0].awaited
            missing = awaited.missing if awaited is not None else None
            self.waiter.until(self._advance_late, self._late[0].operation, missing)

    def _poll_or_fail(self) -> float:
        try:
            return self._poll()
        except BaseException as error:
            self._fail(error)
            return _IDLE_CHECK_INTERVAL

    def _check_or_fail(self) -> None:
        try:
            self.waiter.hooks.check()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        # As after a failed job, the next operation raises the error.
        if self._failed is None:
            self._failed, self._failed_at = error, error.__traceback__
        self._services.clear()

    def _execute(self, operation: str, call: Callable[[], Any]) -> Any:
        # After a failure the ranks no longer agree on the next operation: none is started.
        self.check()
        started = time.perf_counter()
        if started - self._checked > _BUSY_CHECK_INTERVAL:
            self._checked = started
            self._check_or_fail()
            self.check()
        self.activity.begin(operation, started)
        try:
            with self.waiter.tracer.span(operation, "communication"):
                return call()
        except BaseException as error:
            self._failed, self._failed_at = error, error.__traceback__
            raise
        finally:
            ended = time.perf_counter()
            self.activity.end(ended)
            self.busy_seconds += ended - started
