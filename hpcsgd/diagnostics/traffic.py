"""Counters of the bytes that a rank moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Moved:
    """Numbers of bytes, counted at the sender."""

    #: Bytes of MPI messages. MPI does not report the bytes of its own collectives; for an all-reduce of B
    #: bytes over p ranks the bandwidth-optimal 2(p-1)/p * B is counted, for a broadcast B at the root.
    sent: int = 0
    shared: int = 0  # bytes of other ranks' buffers that were read or written in the node's shared memory
    #: Bytes that would have been moved in addition without compression, in reductions, pushes and pulls.
    saved: int = 0

    def add(self, other: Moved) -> None:
        """Add other numbers to these."""
        self.sent += other.sent
        self.shared += other.shared
        self.saved += other.saved

    def __sub__(self, other: Moved) -> Moved:
        return Moved(self.sent - other.sent, self.shared - other.shared, self.saved - other.saved)


class Traffic:
    """Counters of the bytes that this rank has moved, for both of its threads.

    An operation may be begun ahead of the step that uses its result, and is then in flight between two steps.
    Its bytes are in the totals as soon as they are moved, and in those of the steps once a step has used it:
    so the latter are a function of the steps taken.
    """

    def __init__(self) -> None:
        self._total, self._ahead, self._used = Moved(), Moved(), Moved()
        self._lock, self._local = threading.Lock(), threading.local()

    def count(self, *, sent: int = 0, shared: int = 0, saved: int = 0) -> None:
        """Count bytes, see `Moved`."""
        moved, ahead = Moved(sent, shared, saved), getattr(self._local, "ahead", None)
        with self._lock:
            self._total.add(moved)
            if ahead is not None:
                self._ahead.add(moved)
                ahead.add(moved)

    @property
    def sent(self) -> int:
        """Total of the bytes sent, see `Moved`."""
        return self._total.sent

    @property
    def shared(self) -> int:
        """Total of the bytes moved in shared memory."""
        return self._total.shared

    @property
    def saved(self) -> int:
        """Total of the bytes saved by compression."""
        return self._total.saved

    @contextmanager
    def counted_ahead(self, moved: Moved) -> Iterator[None]:
        """Context in which this thread's bytes are added to `moved`, and count in the steps by `use`."""
        self._local.ahead = moved
        try:
            yield
        finally:
            self._local.ahead = None

    def use(self, moved: Moved) -> None:
        """Count the bytes of an operation in the steps, for one has used it."""
        with self._lock:
            self._used.add(moved)

    def of_steps(self) -> tuple[Moved, Moved]:
        """Return the bytes of the steps: those counted at once, and those counted by `use`."""
        with self._lock:
            return self._total - self._ahead, self._used - Moved()
