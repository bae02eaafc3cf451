"""Streams and events of the stand-in: queues of work, done by chance where something waits for it."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hpcsgd

_PACKAGE = str(Path(hpcsgd.__file__).parent)
#: Functions that serve several places, each of which counts.
_HELPERS = {"_synchronize", "record_event", "wait_for", "wait_for_compute", "on_side_stream"}


class Omissions:
    """Waits that hpcsgd does without, to see whether tests notice.

    Attributes
    ----------
    seen
        The places in hpcsgd that waited or recorded an event, as "file:function:line what".
    omitted
        The place that does not; None: all do.
    """

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.omitted: str | None = None

    def omits(self, what: str) -> bool:
        """Return whether the place that calls is to do without this."""
        frame: Any = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(_PACKAGE) and code.co_name not in _HELPERS:
                place = code.co_filename.removeprefix(_PACKAGE)[1:]
                site = f"{place}:{code.co_qualname.replace('.<locals>', '')}:{frame.f_lineno} {what}"
                self.seen[site] = self.seen.get(site, 0) + 1
                return site == self.omitted
            frame = frame.f_back
        return False


omissions = Omissions()


class _Marker:
    """A point in a stream: done once all work before it is."""

    done = False

    def pass_by(self) -> None:
        self.done = True


class _Work:
    """The queues of all streams. One lock: work is done by the thread that waits, one piece at a time."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        #: Whether the thread with the lock does work: what the garbage collector calls there must not.
        self.is_being_done = False
        self._random = random.Random(0)
        self._queues: dict[int, deque[tuple[Callable[[], Any], _Marker | None]]] = {}
        self._numbers = itertools.count()

    @contextmanager
    def _being_done(self) -> Iterator[None]:
        before, self.is_being_done = self.is_being_done, True
        try:
            yield
        finally:
            self.is_being_done = before

    def new_queue(self) -> int:
        """Return the number of a new queue."""
        with self.lock:
            number = next(self._numbers)
            self._queues[number] = deque()
        return number

    def add(self, number: int, run: Callable[[], Any], after: _Marker | None = None) -> None:
        """Queue a piece of work, which is not done before the marker `after` is."""
        with self.lock:
            self._queues[number].append((run, after))

    def do_until(self, marker: _Marker) -> None:
        """Do pieces of work of streams by chance, each stream in order, until a marker is done."""
        with self.lock, self._being_done():
            weights = [self._random.choice((1, 1, 20)) for _ in self._queues]
            while not marker.done:
                ready = [
                    (queue, weight)
                    for queue, weight in zip(self._queues.values(), weights, strict=True)
                    if queue and (queue[0][1] is None or queue[0][1].done)
                ]
                (queue,) = self._random.choices([q for q, _ in ready], [w for _, w in ready])
                run, _ = queue.popleft()
                run()


work = _Work()


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self) -> None:
        self._marker: _Marker | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Record the event after all work that is in a stream now; default: the current one."""
        if not omissions.omits("record"):
            self._marker = (stream or current_stream()).mark()

    def wait(self, stream: Stream | None = None) -> None:
        """Let later work of a stream wait for the event."""
        if self._marker is not None and not omissions.omits("wait"):
            (stream or current_stream()).queue(lambda: None, self._marker)

    def synchronize(self) -> None:
        """Wait for the event."""
        if self._marker is not None and not omissions.omits("synchronize"):
            work.do_until(self._marker)

    def query(self) -> bool:
        """Return whether the event is over; nothing is done for it."""
        return self._marker is None or self._marker.done


class Stream:
    """Stands for `torch.cuda.Stream`."""

    def __init__(self, device: Any = None) -> None:
        self._number = work.new_queue()

    def queue(self, run: Callable[[], Any], after: _Marker | None = None) -> None:
        """Queue a piece of work."""
        work.add(self._number, run, after)

    def mark(self) -> _Marker:
        """Return a marker after all work that is queued now."""
        marker = _Marker()
        self.queue(marker.pass_by)
        return marker

    def synchronize(self) -> None:
        """Wait for all work that is queued now."""
        if not omissions.omits("synchronize"):
            self.drain()

    def drain(self) -> None:
        """Do all work that is queued now, whether or not the caller needs it."""
        work.do_until(self.mark())

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event after all work that is queued now."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        """Let later work wait for an event."""
        event.wait(self)

    def wait_stream(self, other: Stream) -> None:
        """Let later work wait for all that is queued in another stream now."""
        self.wait_event(other.record_event())


class _Current(threading.local):
    stream: Stream | None = None


_default, _current = Stream(), _Current()


def current_stream(device: Any = None) -> Stream:
    """Return the current stream of this thread."""
    return _current.stream or _default


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Make a stream the current one of this thread."""
    before, _current.stream = _current.stream, chosen or _current.stream
    try:
        yield
    finally:
        _current.stream = before


def synchronize(device: Any = None) -> None:
    """Wait for all work of all streams."""
    with work.lock:
        markers = []
        for number in list(work._queues):
            marker = _Marker()
            work.add(number, marker.pass_by)
            markers.append(marker)
        for marker in markers:
            work.do_until(marker)
