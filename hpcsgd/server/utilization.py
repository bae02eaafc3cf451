"""Utilization of a server."""

from __future__ import annotations

import time


class Utilization:
    """Measures the queue length and the busy time of a server."""

    def __init__(self) -> None:
        self._reset()

    def record_poll(self, ready: int, seconds: float) -> None:
        """Record a poll of all links, of which `ready` had messages; handling them took `seconds`."""
        self._busy_seconds += seconds
        if ready:
            self._polls += 1
            self._ready += ready

    def metrics(self) -> dict[str, float]:
        """Metrics since the last call.

        Returns
        -------
        dict
            "queue": mean number of links with messages, over the polls at which any had one; "load": busy
            fraction of the time.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        metrics = {"queue": self._ready / max(1, self._polls), "load": min(1.0, self._busy_seconds / seconds)}
        self._reset()
        return metrics

    def _reset(self) -> None:
        self._since = time.perf_counter()
        self._busy_seconds = 0.0
        self._polls = self._ready = 0
