"""Tracer: writes a timeline of both threads of a rank to a file while they run."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO, Literal

from hpcsgd.diagnostics.activity import ActivityRecord
from hpcsgd.diagnostics.traffic import Traffic

Kind = Literal["step", "compute", "wait", "communication", "service", "codec"]

#: The most events of a rank; about 40 MB in the merged file.
EVENT_LIMIT = 200_000
#: Events, and seconds, after which the buffer is flushed; a rank that is killed loses no more than these.
_BUFFERED_EVENTS, _BUFFERED_SECONDS = 500, 0.25
#: Steps of services that are shorter and moved nothing are not recorded: there are thousands a second.
_SHORT = 100e-6
_COUNTED = ("communication", "service")
_NULL_SPAN = nullcontext()


class NullTracer:
    """Records nothing; the base of `Tracer`."""

    on = False

    def span(self, name: str, kind: Kind) -> AbstractContextManager[Any]:
        """Record the time inside as an event of this thread; spans of a thread are nested or disjoint."""
        return _NULL_SPAN

    def record(self, name: str, kind: Kind, started: float, ended: float, step: int | None = None) -> None:
        """Record an event of the compute thread, in seconds of `time.perf_counter`."""

    def begin_step(self) -> None:
        """Begin a step, unless one has begun already."""

    def end_step(self, step: int) -> None:
        """End the step that has begun, and record it with this number."""

    def abandon_step(self) -> None:
        """Discard the step that has begun."""

    def flush(self) -> None:
        """Write the buffered events."""

    def end(self, footer: Mapping[str, Any]) -> None:
        """Write the buffered events and a footer, and close the file."""


class Tracer(NullTracer):
    """Writes one rank's events into its part of a trace, see `hpcsgd.diagnostics.trace_file`.

    Bytes are attributed to the innermost open span of communication of the thread that begins or ends one,
    else to that of the other thread. Each byte counts once; its span can be wrong only for bytes that one
    thread moves while the other is inside a service.

    Parameters
    ----------
    file
        The part of this rank, unbuffered.
    header
        The rank, its host, and its clock, see `hpcsgd.mpi.clock_sync`.
    traffic, activity
        The bytes and the current step of this rank.
    in_communication
        Returns whether the caller is the communication thread.

    Attributes
    ----------
    count
        The number of events.
    """

    on = True

    def __init__(
        self,
        file: BinaryIO,
        header: Mapping[str, Any],
        traffic: Traffic,
        activity: ActivityRecord,
        in_communication: Callable[[], bool],
    ) -> None:
        self._traffic, self._activity, self._in_communication = traffic, activity, in_communication
        self._sent, self._shared = traffic.sent, traffic.shared
        self._unattributed = _Span(self, "", "communication")
        self._open: tuple[list[_Span], list[_Span]] = ([], [])
        self._events: deque[tuple[Any, ...]] = deque()
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self.count = 0
        self._step_began: float | None = None
        self._written = self._step_ended = time.perf_counter()
        self._file = file
        self._write(header)

    def span(self, name: str, kind: Kind) -> AbstractContextManager[Any]:
        return _Span(self, name, kind)

    def begin(self, span: _Span) -> None:
        """Open a span in this thread."""
        span.thread, span.step = int(self._in_communication()), self._activity.step
        if span.kind in _COUNTED:
            with self._counting:
                self._attribute(span.thread)
                self._open[span.thread].append(span)
        else:
            self._open[span.thread].append(span)
        span.started = time.perf_counter()

    def finish(self, span: _Span) -> None:
        """Close the span that was opened last in this thread."""
        ended, open_spans = time.perf_counter(), self._open[span.thread]
        thread, kind, name, started = span.thread, span.kind, span.name, span.started
        if kind in _COUNTED:
            with self._counting:
                self._attribute(thread)
                open_spans.pop()
            sent, shared = span.sent, span.shared
            if sent or shared or kind == "communication" or ended - started > _SHORT:
                self._append((thread, kind, name, started, ended, span.step, sent, shared))
        else:
            open_spans.pop()
            if kind != "wait" or not open_spans or open_spans[-1].kind != "wait":  # else part of that wait
                self._append((thread, kind, name, started, ended, span.step))

    def record(self, name: str, kind: Kind, started: float, ended: float, step: int | None = None) -> None:
        self._append((0, kind, name, started, ended, self._activity.step if step is None else step))

    def begin_step(self) -> None:
        if self._step_began is None:
            self._step_began = time.perf_counter()

    def end_step(self, step: int) -> None:
        began, self._step_began = self._step_began, None
        # Without an iteration over `run.batches` steps have no gaps.
        started, self._step_ended = began or self._step_ended, time.perf_counter()
        self.record("step", "step", started, self._step_ended, step)

    def abandon_step(self) -> None:
        self._step_began = None

    def flush(self) -> None:
        if not self._writing.acquire(blocking=False):
            return  # the other thread writes them
        try:
            if events := [self._events.popleft() for _ in range(len(self._events))]:
                self._write(events)
            self._written = time.perf_counter()
        finally:
            self._writing.release()

    def end(self, footer: Mapping[str, Any]) -> None:
        self._attribute(0)
        self.flush()
        rest = self._unattributed
        left_out = max(0, self.count - EVENT_LIMIT)
        self._write({**footer, "sent": rest.sent, "shared": rest.shared, "left_out": left_out})
        self.count = EVENT_LIMIT  # a reference to this tracer that is still used records nothing more
        self._file.close()

    def _attribute(self, thread: int) -> None:
        """Add the bytes moved since the last call to the span that moves them."""
        sent, shared = self._traffic.sent, self._traffic.shared
        if sent != self._sent or shared != self._shared:
            owner = _innermost(self._open[thread]) or _innermost(self._open[1 - thread]) or self._unattributed
            owner.sent += sent - self._sent
            owner.shared += shared - self._shared
            self._sent, self._shared = sent, shared

    def _append(self, event: tuple[Any, ...]) -> None:
        self.count += 1
        if self.count > EVENT_LIMIT:
            return
        self._events.append(event)
        if len(self._events) >= _BUFFERED_EVENTS or event[4] - self._written > _BUFFERED_SECONDS:
            self.flush()

    def _write(self, line: Any) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            # A failed trace must not fail the run.
            self.count = max(self.count, EVENT_LIMIT)
            warnings.warn(
                f"the trace ends here: {error}; training continues without it; free space on the "
                "file system of the run (--trace) or of HPCSGD_TRACE, then start again for a complete trace",
                RuntimeWarning,
                stacklevel=2,
            )


class _Span:
    __slots__ = ("_tracer", "kind", "name", "sent", "shared", "started", "step", "thread")

    def __init__(self, tracer: Tracer, name: str, kind: Kind) -> None:
        self._tracer, self.name, self.kind = tracer, name, kind
        self.started = 0.0
        self.thread = self.step = self.sent = self.shared = 0

    def __enter__(self) -> None:
        self._tracer.begin(self)

    def __exit__(self, *_: object) -> None:
        self._tracer.finish(self)


def _innermost(spans: list[_Span]) -> _Span | None:
    """The innermost span that counts bytes."""
    # A copy, for the other thread may open and close its spans meanwhile.
    return next((span for span in spans[::-1] if span.kind in _COUNTED), None)
