"""A timeline of what both threads of a rank do, as a file that grows while they do it."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO, Literal

from hpcsgd.diagnostics.activity import Status
from hpcsgd.diagnostics.traffic import Traffic

Kind = Literal["step", "compute", "wait", "communication", "service", "codec"]

#: Events of a rank; about 40 MB in the merged file.
LIMIT = 200_000
#: What a rank that is killed has not written: events, and seconds.
_UNWRITTEN, _UNWRITTEN_SECONDS = 500, 0.25
#: A service that has moved nothing is called thousands of times a second.
_SHORT = 100e-6
_COUNTED = ("communication", "service")
_NOTHING = nullcontext()


class Off:
    """Traces nothing."""

    on = False

    def span(self, name: str, kind: Kind) -> AbstractContextManager[Any]:
        """What happens inside is an event of this thread; spans of a thread lie in each other, or apart."""
        return _NOTHING

    def record(self, name: str, kind: Kind, started: float, ended: float, step: int | None = None) -> None:
        """An event of the compute thread, in seconds of `time.perf_counter`."""

    def begin_step(self) -> None:
        """A step begins here, unless one has begun already."""

    def end_step(self, step: int) -> None:
        """The step that has begun is over; it was this one."""

    def abandon_step(self) -> None:
        """What has begun becomes no step."""

    def flush(self) -> None:
        """Bring to the file what is not there yet."""

    def end(self, about: Mapping[str, Any]) -> None:
        """Write what is left, and this, and nothing more."""


class Trace(Off):
    """Writes one rank's events into its part of a trace, see `hpcsgd.diagnostics.trace_file`.

    Bytes go to the innermost span of communication that is open in the thread that begins or ends one, else
    to that of the other thread. So each byte counts once; whose it is can be wrong only for bytes that
    one thread moves while the other is inside a service.

    Parameters
    ----------
    file
        Its part, not buffered.
    about
        The rank, its host, and its clock, see `hpcsgd.mpi.clock_sync`.
    traffic, status
        This rank's bytes, and its step.
    in_communication
        Whether the caller is the communication thread.

    Attributes
    ----------
    count
        How many events there were.
    """

    on = True

    def __init__(
        self,
        file: BinaryIO,
        about: Mapping[str, Any],
        traffic: Traffic,
        status: Status,
        in_communication: Callable[[], bool],
    ) -> None:
        self._traffic, self._status, self._in_communication = traffic, status, in_communication
        self._sent, self._shared = traffic.sent, traffic.shared
        self._elsewhere = _Span(self, "", "communication")
        self._open: tuple[list[_Span], list[_Span]] = ([], [])
        self._events: deque[tuple[Any, ...]] = deque()
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self.count = 0
        self._step_began: float | None = None
        self._written = self._step_ended = time.perf_counter()
        self._file = file
        self._write(about)

    def span(self, name: str, kind: Kind) -> AbstractContextManager[Any]:
        return _Span(self, name, kind)

    def begin(self, span: _Span) -> None:
        """Open a span in this thread."""
        span.lane, span.step = int(self._in_communication()), self._status.step
        if span.kind in _COUNTED:
            with self._counting:
                self._settle(span.lane)
                self._open[span.lane].append(span)
        else:
            self._open[span.lane].append(span)
        span.started = time.perf_counter()

    def finish(self, span: _Span) -> None:
        """Close the span that was opened last in this thread."""
        ended, around = time.perf_counter(), self._open[span.lane]
        lane, kind, name, started = span.lane, span.kind, span.name, span.started
        if kind in _COUNTED:
            with self._counting:
                self._settle(lane)
                around.pop()
            sent, shared = span.sent, span.shared
            if sent or shared or kind == "communication" or ended - started > _SHORT:
                self._keep((lane, kind, name, started, ended, span.step, sent, shared))
        else:
            around.pop()
            if kind != "wait" or not around or around[-1].kind != "wait":  # else a part of that one
                self._keep((lane, kind, name, started, ended, span.step))

    def record(self, name: str, kind: Kind, started: float, ended: float, step: int | None = None) -> None:
        self._keep((0, kind, name, started, ended, self._status.step if step is None else step))

    def begin_step(self) -> None:
        if self._step_began is None:
            self._step_began = time.perf_counter()

    def end_step(self, step: int) -> None:
        began, self._step_began = self._step_began, None
        # Who does not iterate over `run.batches` has steps without gaps.
        started, self._step_ended = began or self._step_ended, time.perf_counter()
        self.record("step", "step", started, self._step_ended, step)

    def abandon_step(self) -> None:
        self._step_began = None

    def flush(self) -> None:
        if not self._writing.acquire(blocking=False):
            return  # the other thread is about it
        try:
            if events := [self._events.popleft() for _ in range(len(self._events))]:
                self._write(events)
            self._written = time.perf_counter()
        finally:
            self._writing.release()

    def end(self, about: Mapping[str, Any]) -> None:
        self._settle(0)
        self.flush()
        rest = self._elsewhere
        left_out = max(0, self.count - LIMIT)
        self._write({**about, "sent": rest.sent, "shared": rest.shared, "left_out": left_out})
        self.count = LIMIT  # whoever still holds this trace adds nothing
        self._file.close()

    def _settle(self, lane: int) -> None:
        """Give what was moved since the last time to the span that moves it."""
        sent, shared = self._traffic.sent, self._traffic.shared
        if sent != self._sent or shared != self._shared:
            owner = _innermost(self._open[lane]) or _innermost(self._open[1 - lane]) or self._elsewhere
            owner.sent += sent - self._sent
            owner.shared += shared - self._shared
            self._sent, self._shared = sent, shared

    def _keep(self, event: tuple[Any, ...]) -> None:
        self.count += 1
        if self.count > LIMIT:
            return
        self._events.append(event)
        if len(self._events) >= _UNWRITTEN or event[4] - self._written > _UNWRITTEN_SECONDS:
            self.flush()

    def _write(self, line: Any) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            # A run does not end for its trace.
            self.count = max(self.count, LIMIT)
            warnings.warn(f"the trace ends here: {error}", RuntimeWarning, stacklevel=2)


class _Span:
    """An event that is under way."""

    __slots__ = ("_trace", "kind", "lane", "name", "sent", "shared", "started", "step")

    def __init__(self, trace: Trace, name: str, kind: Kind) -> None:
        self._trace, self.name, self.kind = trace, name, kind
        self.started = 0.0
        self.lane = self.step = self.sent = self.shared = 0

    def __enter__(self) -> None:
        self._trace.begin(self)

    def __exit__(self, *_: object) -> None:
        self._trace.finish(self)


def _innermost(spans: list[_Span]) -> _Span | None:
    """Of those that count bytes; a copy, for the other thread may open and close its own meanwhile."""
    return next((span for span in spans[::-1] if span.kind in _COUNTED), None)
