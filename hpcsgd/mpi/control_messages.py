"""Small messages outside all collectives: requests, answered during any operation, and notifications."""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

_REQUEST, _REPLY, _NOTIFICATION, _DEPARTURE, _INTERRUPTION = 1, 2, 3, 4, 5  # tags
_TIMEOUT = 2.0  # seconds
_SHORTEST_PAUSE, _LONGEST_PAUSE = 50e-6, 5e-3  # seconds between two looks for replies


class ControlChannel:
    """Requests with replies, and one-way notifications, on a communicator of their own.

    A request is answered by whichever thread of the other rank polls: the communication thread when it waits
    or idles. A rank that is stopped, or whose threads are all in native code, does not answer.

    Parameters
    ----------
    comm
        An mpi4py communicator used for nothing else.
    handle
        Returns the reply to a request; both are picklable.

    Attributes
    ----------
    comm
        The communicator.
    notifications
        By rank, the last one received, and its time of `time.monotonic`.
    departures
        By rank that has left, all that it has sent since, see `depart`.
    absent
        By rank that has left or is interrupted, the reason, and since when (`time.monotonic`).
    interruptions
        By rank, the number of messages of `interrupt` that have been received.
    """

    def __init__(self, comm: Any, handle: Callable[[Any], Any]) -> None:
        self.notifications: dict[int, tuple[float, Any]] = {}
        self.departures: dict[int, list[Any]] = {}
        self.absent: dict[int, tuple[str, float]] = {}
        self.interruptions: Counter[int] = Counter()
        self.comm = comm
        self._handle = handle
        self._lock = threading.Lock()
        self._requesting = threading.Lock()
        self._number = 0
        self._replies: dict[int, Any] = {}
        self._sent: list[Any] = []

    def poll(self) -> None:
        """Answer the requests that have arrived, and store replies and notifications."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            # The first call of a library may only receive what the second one finds.
            if not (self._sent or self.comm.Iprobe() or self.comm.Iprobe()):
                return
            while self.comm.Iprobe(tag=_REQUEST):
                source, (number, request) = self._receive(_REQUEST)
                self._send(source, _REPLY, (number, self._handle(request)))
            while self.comm.Iprobe(tag=_REPLY):
                rank, (number, reply) = self._receive(_REPLY)
                if number == self._number:
                    self._replies[rank] = reply
            while self.comm.Iprobe(tag=_NOTIFICATION):
                rank, content = self._receive(_NOTIFICATION)
                self.notifications[rank] = time.monotonic(), content
            while self.comm.Iprobe(tag=_DEPARTURE):
                rank, content = self._receive(_DEPARTURE)
                self.departures.setdefault(rank, []).append(content)
                if len(self.departures[rank]) == 1:
                    self.absent[rank] = content[0], time.monotonic()
            while self.comm.Iprobe(tag=_INTERRUPTION):
                rank, reason = self._receive(_INTERRUPTION)
                self.interruptions[rank] += 1
                self.absent.pop(rank, None)
                if reason:
                    self.absent[rank] = reason, time.monotonic()
            self._sent = [entry for entry in self._sent if not entry[0].Test()]
        finally:
            self._lock.release()

    def request(self, ranks: Iterable[int], request: Any, timeout: float = _TIMEOUT) -> dict[int, Any]:
        """Return the replies by rank, of those other ranks that have replied after `timeout` seconds."""
        others = set(ranks) - {self.comm.rank}
        with self._requesting:
            with self._lock:
                self._number += 1
                self._replies = {}
                for rank in others:
                    self._send(rank, _REQUEST, (self._number, request))
            deadline, pause = time.monotonic() + timeout, _SHORTEST_PAUSE
            while len(self._replies) < len(others) and time.monotonic() < deadline:
                time.sleep(pause)
                self.poll()
                pause = min(2 * pause, _LONGEST_PAUSE)
            return dict(self._replies)

    def notify(self, rank: int, content: Any) -> None:
        """Send a message that needs no reply."""
        with self._lock:
            self._send(rank, _NOTIFICATION, content)

    def interrupt(self, rank: int, reason: str) -> None:
        """Notify that this rank is interrupted, or with an empty reason that it goes on."""
        with self._lock:
            self._send(rank, _INTERRUPTION, reason)

    def depart(self, rank: int, content: Any) -> None:
        """Send a message of a rank that leaves, the first one with its reason; all of them are kept."""
        with self._lock:
            self._send(rank, _DEPARTURE, content)

    def _send(self, rank: int, tag: int, content: Any) -> None:
        message = bytearray(pickle.dumps(content))
        self._sent.append((self.comm.Isend([message, len(message)], rank, tag), message))

    def _receive(self, tag: int) -> tuple[int, Any]:
        from mpi4py import MPI

        status = MPI.Status()
        content = self.comm.recv(source=MPI.ANY_SOURCE, tag=tag, status=status)
        return status.Get_source(), content
