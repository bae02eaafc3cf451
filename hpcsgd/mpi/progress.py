"""The communication thread: one queue of jobs, executed in order, so that every rank has one order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from hpcsgd.diagnostics.activity import Status
from hpcsgd.errors import HpcsgdError, RankFailed
from hpcsgd.mpi.waiting import Waiter

_IDLE_LOOK_AROUND = 0.25  # seconds
_BUSY_LOOK_AROUND = 2.0  # seconds after which even a thread that is never idle looks around
_LAST_JOB = 10.0  # seconds that a job may take to notice that ranks have died
#: What a service returns that waits for messages: seconds.
LISTENING = 1e-3

#: Does a little, never waits, and says in how many seconds it wants to be called again at the latest: 0
#: where there was something to do.
Service = Callable[[], float]


class Work:
    """A job that was handed to the communication thread.

    Its result is ready once `test()` is true; `wait()` returns it or raises what the job raised.
    """

    def __init__(self, progress: Progress, what: str, job: Callable[[], Any]) -> None:
        self.what = what
        self._progress = progress
        self._job: Callable[[], Any] | None = job
        self._done = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def test(self) -> bool:
        """Whether the job is over, without waiting."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> Any:
        """Return the job's result once it is there.

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
            with self._progress.waiting(self.what):
                self._progress.waiter.event(self._done, lambda: self.what, timeout)

    def _run(self) -> None:
        job, self._job = self._job, None
        assert job is not None
        try:
            self._result = self._progress._execute(self.what, job)
        except BaseException as error:
            self._error = error
        # The job holds the buffers; it is dropped first, so that who sees "done" may free them.
        del job
        self._done.set()


class Progress:
    """Runs the communication of one rank.

    Parameters
    ----------
    waiter
        Waits and answers for this rank.
    status
        Where the current operation is written for who asks.
    threaded
        False runs every job at once in the caller (MPI below `MPI_THREAD_MULTIPLE`).
    """

    def __init__(self, waiter: Waiter, status: Status, *, threaded: bool) -> None:
        self.waiter = waiter
        self.status = status
        self.threaded = threaded
        self.busy_seconds = 0.0
        self.wait_seconds = 0.0
        self._jobs: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._count = threading.Lock()
        self._unfinished = 0
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._services: list[Service] = []
        self._serving = threading.Lock()
        self._awaited = False
        self._looked = time.perf_counter()
        waiter.serve = lambda: self._serve() == 0
        waiter.patient = self._nobody_waits

    def need_thread(self, what: str) -> None:
        """Raise on all ranks, saying what needs it, where communication has no thread of its own."""
        if not self.threaded:
            raise HpcsgdError(
                what,
                expected="MPI_THREAD_MULTIPLE",
                got="an MPI that gives less",
                do="use an MPI that gives it, or a method that keeps step, as local",
                everywhere=True,
            )

    def serve(self, service: Service) -> None:
        """Call a service again and again, by one thread at a time: while the thread is idle, and in waits."""
        with self._serving:
            self._services.append(service)
        self.call_services()

    def dismiss(self, service: Service) -> None:
        """Call it no more; it is not under way when this returns."""
        with self._serving:
            if service in self._services:
                self._services.remove(service)

    def call_services(self) -> None:
        """Let the idle thread call them now, earlier than they said."""
        self.submit("a call of the services", lambda: None)

    def _serve(self) -> float:
        if not self._serving.acquire(blocking=False):
            return LISTENING  # the other thread has called them
        try:
            return min([self._call(service) for service in self._services], default=_IDLE_LOOK_AROUND)
        finally:
            self._serving.release()

    def _call(self, service: Service) -> float:
        with self.waiter.trace.span(getattr(service, "__qualname__", "service"), "service"):
            return service()

    def submit(self, what: str, job: Callable[[], Any]) -> Work:
        """Queue a job; every rank must submit the same jobs in the same order."""
        work = Work(self, what, job)
        if not self.threaded:
            work._run()
            return work
        self.start()
        with self._count:
            self._unfinished += 1
        self._jobs.put(work)
        return work

    def start(self) -> None:
        """Start the thread, which answers other ranks while it has nothing else to do."""
        if self.threaded and self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="hpcsgd", daemon=True)
            self._thread.start()

    def run(self, what: str, job: Callable[[], Any]) -> Any:
        """Execute a job and return its result; in this thread where nothing is queued before it.

        The order is the same as with `submit`, and a small job is spared two changes of thread. A job may
        run another, which is then a part of it.
        """
        if self.inside():
            return job()
        if self._unfinished:
            return self.submit(what, job).wait()
        with self._counted():
            return self._execute(what, job)

    def inside(self) -> bool:
        """Whether the caller is the communication thread."""
        return threading.current_thread() is self._thread

    def check(self) -> None:
        """Raise what a job or a service has failed with."""
        if self._failed is not None:
            raise self._failed

    def until(
        self, done: Callable[[], bool], what: str, missing: Callable[[], Iterable[int]] | None = None
    ) -> None:
        """Wait in the compute thread for what services and jobs bring about; raises where these have failed.

        Parameters
        ----------
        done, what, missing
            As of `Waiter.until`.
        """
        with self.waiting(what):
            self.waiter.until(lambda: self._failed is not None or done(), what, missing)
        self.check()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, the compute thread waits for something, which is counted."""
        with self._counted(), self.waiter.trace.span(what, "wait"):
            yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started, self._awaited = time.perf_counter(), True
        try:
            yield
        finally:
            self._awaited = False
            self.wait_seconds += time.perf_counter() - started

    def _nobody_waits(self) -> bool:
        return not self._awaited and self.inside()

    def drain(self, timeout: float | None = None) -> None:
        """Wait until every job submitted so far is over; errors stay with their `Work`."""
        if self._unfinished:
            self.submit("the jobs outstanding", lambda: None)._finish(timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Finish the queue and end the thread."""
        if self._thread is not None:
            self.drain(timeout)
            self._jobs.put(None)
            self._thread.join(self.waiter.timeout)
            self._thread = None

    def abandon(self) -> None:
        """End the thread without its jobs: ranks have died, and what is in flight never ends."""
        self._failed = self._failed or RankFailed("a rank of this job has died")
        self._services.clear()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._jobs.put(None)
            thread.join(_LAST_JOB)

    def _loop(self) -> None:
        while True:
            work = self._next()
            if work is None:
                return
            work._run()
            with self._count:
                self._unfinished -= 1
            # An idle thread that still held the last job would keep its buffers alive.
            del work

    def _next(self) -> Work | None:
        """The next job; until there is one, other ranks' questions are answered and services called."""
        looked = time.monotonic()
        while True:
            pause = min(self._serve_or_fail(), _IDLE_LOOK_AROUND)
            try:
                return self._jobs.get(timeout=pause) if pause else self._jobs.get_nowait()
            except queue.Empty:
                if time.monotonic() - looked > _IDLE_LOOK_AROUND / 2:
                    self._look_around_or_fail()
                    looked = time.monotonic()

    def _serve_or_fail(self) -> float:
        try:
            return self._serve()
        except BaseException as error:
            self._fail(error)
            return _IDLE_LOOK_AROUND

    def _look_around_or_fail(self) -> None:
        try:
            self.waiter.look_around()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        # As with a job: whoever communicates next is told.
        self._failed = self._failed or error
        self._services.clear()

    def _execute(self, what: str, job: Callable[[], Any]) -> Any:
        # Where one has failed the ranks no longer agree on what comes next: nothing else is started.
        self.check()
        started = time.perf_counter()
        if started - self._looked > _BUSY_LOOK_AROUND:
            self._looked = started
            self._look_around_or_fail()
            self.check()
        self.status.begin(what, started)
        try:
            with self.waiter.trace.span(what, "communication"):
                return job()
        except BaseException as error:
            self._failed = error
            raise
        finally:
            ended = time.perf_counter()
            self.status.end(ended)
            self.busy_seconds += ended - started
