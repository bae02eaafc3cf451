"""The communication thread: executes one queue of jobs in order, the same on all ranks."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from hpcsgd.diagnostics.activity import ActivityRecord
from hpcsgd.errors import DeadlineExceeded, HpcsgdError, RankFailed
from hpcsgd.mpi.departure import Departure
from hpcsgd.mpi.waiting import DeadlineWaiter

# Seconds, all of them.
_IDLE_CHECK_INTERVAL = 0.25
_BUSY_CHECK_INTERVAL = 2.0  # a thread that is never idle checks on other ranks after this long
_ABANDON_TIMEOUT = 10.0  # for a job to detect that ranks have failed
#: What a poller returns while it waits for messages, and when it is not to be called any more.
POLL_INTERVAL, POLLER_ENDED = 1e-3, math.inf

#: Does a little work without waiting, and returns the seconds until it is to be called again at the latest: 0
#: where it made progress; `POLLER_ENDED` if never again.
Poller = Callable[[], float]


class Work:
    """A job submitted to the communication thread.

    Its result is ready once `test()` is true; `wait()` returns it or raises the error of the job.
    """

    def __init__(self, progress: Progress, operation: str, job: Callable[[], Any]) -> None:
        self.operation = operation
        self._progress = progress
        self._job: Callable[[], Any] | None = job
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def test(self) -> bool:
        """Return whether the job is complete, without waiting."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the job and return its result.

        Parameters
        ----------
        timeout
            Seconds; by default the world's deadline (`HPCSGD_TIMEOUT`).

        Raises
        ------
        DeadlineExceeded
            When the timeout passes first. The job stays in the queue.
        """
        self._finish(timeout)
        if self._error is not None:
            raise self._error
        return self._result

    def _finish(self, timeout: float | None) -> None:
        if not self._done.is_set():
            with self._progress.waiting(self.operation):
                self._progress.waiter.event(self._done, lambda: self.operation, timeout)

    def _run(self) -> None:
        job, self._job = self._job, None
        assert job is not None
        try:
            self._result = self._progress._execute(self.operation, job)
        except BaseException as error:
            self._error = error
        # The job holds the buffers; it is released first, so that a caller that sees "done" may free them.
        del job
        self._done.set()


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
        self._jobs: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._count = threading.Lock()
        self._unfinished = 0
        self._failed: BaseException | None = None
        self._failed_at: TracebackType | None = None
        self._thread: threading.Thread | None = None
        self._pollers: list[Poller] = []
        self._polling = threading.Lock()
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

    def add_poller(self, poller: Poller) -> None:
        """Call a poller repeatedly, by one thread at a time: while the communication thread is idle, and in
        waits.
        """
        with self._polling:
            self._pollers.append(poller)
        self.poll_now()

    def remove_poller(self, poller: Poller) -> None:
        """Stop calling a poller; on return no call of it is in progress."""
        with self._polling:
            if poller in self._pollers:
                self._pollers.remove(poller)

    def poll_now(self) -> None:
        """Make the idle thread call all pollers now, before their intervals have passed."""
        self.submit("a call of the pollers", lambda: None)

    def poll(self) -> bool:
        """Call all pollers once, unless the other thread does; return whether one made progress."""
        return self._poll() == 0

    def _poll(self) -> float:
        if not self._polling.acquire(blocking=False):
            return POLL_INTERVAL  # the other thread has called them
        try:
            pauses = [self._call(poller) for poller in self._pollers]
            if POLLER_ENDED in pauses:
                ended = [pause == POLLER_ENDED for pause in pauses]
                self._pollers = [poller for poller, end in zip(self._pollers, ended, strict=True) if not end]
            return min(pauses, default=_IDLE_CHECK_INTERVAL)
        finally:
            self._polling.release()

    def _call(self, poller: Poller) -> float:
        with self.waiter.tracer.span(getattr(poller, "__qualname__", "service"), "service"):
            return poller()

    def submit(self, operation: str, job: Callable[[], Any]) -> Work:
        """Queue a job; every rank must submit the same jobs in the same order."""
        if self._departure is not None:
            self.check()
        work = Work(self, operation, job)
        if not self.threaded:
            work._run()
            return work
        self.start()
        with self._count:
            self._unfinished += 1
        self._jobs.put(work)
        return work

    def start(self) -> None:
        """Start the communication thread, which also serves other ranks' requests while it is idle."""
        if self.threaded and self._thread is None:
            self._thread = threading.Thread(target=self._execute_jobs, name="hpcsgd", daemon=True)
            self._thread.start()

    def run(self, operation: str, job: Callable[[], Any]) -> Any:
        """Execute a job and return its result; in the calling thread where the queue is empty.

        The order is the same as with `submit`, and a small job is spared two changes of thread. A job may run
        another, which is then a part of it.
        """
        if self.in_communication_thread():
            return job()
        if self._unfinished:
            return self.submit(operation, job).wait()
        with self._counted():
            return self._execute(operation, job)

    def leave(self, departure: Departure) -> None:
        """Leave once the queue is empty, in the communication thread if there is one; never waits.

        Nothing can be submitted afterwards.
        """
        self._departure = departure
        departure.has_thread = self._thread is not None
        self._jobs.put(None)

    def in_communication_thread(self) -> bool:
        """Return whether the caller is the communication thread."""
        return threading.current_thread() is self._thread

    def in_background(self) -> bool:
        """Return whether this is the communication thread and the compute thread does not wait for it."""
        return not self._compute_waits and self.in_communication_thread()

    def check(self) -> None:
        """Raise the error of a failed job or poller, or that this rank has left."""
        if self._departure is not None and not self.in_communication_thread():
            raise self._departure.error()
        if self._failed is not None:
            raise self._failed.with_traceback(self._failed_at)  # its own: each raise adds frames

    def until(
        self, done: Callable[[], bool], operation: str, missing: Callable[[], Iterable[int]] | None = None
    ) -> None:
        """Wait in the compute thread for a result of pollers and jobs; raises the error of a failed one.

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
        """Wait until every job submitted so far is complete; an error is raised by its `Work` only."""
        if self._unfinished:
            self.submit("the outstanding jobs", lambda: None)._finish(timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Complete the queue and end the thread."""
        if self._thread is None:
            return
        if self._departure is None:
            self.drain(timeout)
            self._jobs.put(None)
        self._stopping.set()
        limit = self.waiter.timeout if timeout is None else timeout
        self._thread.join(limit)
        if self._thread.is_alive() and self._departure is not None:
            raise DeadlineExceeded(f"no end of the outstanding jobs after {limit:g} s", rank=self.waiter.rank)
        self._thread = None

    def release(self) -> None:
        """Forget what refers to buffers: the error of a failed job, pollers, and jobs they have queued."""
        self._failed = self._failed_at = None
        self._pollers.clear()
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()

    def abandon(self) -> None:
        """End the thread without its jobs: after ranks have failed, their communication never completes."""
        self._failed = self._failed or RankFailed("a rank of this job has died")
        self._pollers.clear()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(_ABANDON_TIMEOUT)

    def _execute_jobs(self) -> None:
        while True:
            work = self._next_job()
            if work is None:
                if self._departure is not None:
                    self._pollers.clear()
                    self._departure.run(self._stopping.is_set)
                return
            work._run()
            with self._count:
                self._unfinished -= 1
            # An idle thread that still held the last job would keep its buffers alive.
            del work

    def _next_job(self) -> Work | None:
        """The next job; until there is one, serves other ranks' requests and calls pollers."""
        checked = time.monotonic()
        while True:
            pause = min(self._poll_or_fail(), _IDLE_CHECK_INTERVAL)
            try:
                return self._jobs.get(timeout=pause) if pause else self._jobs.get_nowait()
            except queue.Empty:
                if time.monotonic() - checked > _IDLE_CHECK_INTERVAL / 2:
                    self._check_or_fail()
                    checked = time.monotonic()

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
        self._pollers.clear()

    def _execute(self, operation: str, job: Callable[[], Any]) -> Any:
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
                return job()
        except BaseException as error:
            self._failed, self._failed_at = error, error.__traceback__
            raise
        finally:
            ended = time.perf_counter()
            self.activity.end(ended)
            self.busy_seconds += ended - started
