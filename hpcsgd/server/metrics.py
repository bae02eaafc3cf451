"""Metrics of a parameter server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def server_metrics(staleness: Counter[int], dropped: int, utilization: Mapping[str, float]) -> dict[str, Any]:
    """Metrics of a server, for a record of `metrics.jsonl`; those of a worker are 0.

    Returns
    -------
    dict
        "staleness" and "longest_staleness": mean and maximum number of updates of others that a push had
        missed; "staleness_histogram": number of pushes that had missed 0, 1, ... of them; "left_out": number
        of pushes that were dropped as too late, so far; "queue" and "load": see `utilization.Utilization`.
    """
    longest = max(staleness, default=0)
    return {
        "staleness": sum(k * n for k, n in staleness.items()) / max(1, staleness.total()),
        "longest_staleness": longest,
        "staleness_histogram": [staleness[k] for k in range(longest + 1)],
        "left_out": dropped,
        **utilization,
    }
