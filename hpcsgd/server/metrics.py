"""Metrics of a parameter server: the staleness of pushes, and the utilization of the server."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any


def server_metrics(staleness: Counter[int], dropped: int, utilization: Mapping[str, float]) -> dict[str, Any]:
    """Metrics of a server, for a record of `metrics.jsonl`; those of a worker are 0.

    "staleness" and "longest_staleness": mean and maximum number of updates of others that a push had missed;
    "staleness_histogram": number of pushes that had missed 0, 1, ... of them; "left_out": number of pushes
    that were dropped as too late, so far; "queue" and "load": see `Utilization`.
    """
    longest = max(staleness, default=0)
    return {
        "staleness": sum(k * n for k, n in staleness.items()) / max(1, staleness.total()),
        "longest_staleness": longest,
        "staleness_histogram": [staleness[k] for k in range(longest + 1)],
        "left_out": dropped,
        **utilization,
    }


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
