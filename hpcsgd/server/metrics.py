"""Metrics of a parameter server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def figures_of(staleness: Counter[int], left_out: int, load: Mapping[str, float]) -> dict[str, Any]:
    """What a record of metrics says of a server; of a worker all is 0.

    Returns
    -------
    dict
        "staleness" and "longest_staleness": how many updates of others pushes were behind, and
        "staleness_histogram": how many were behind by 0, 1, ...; "left_out": pushes so far that came too late
        to be of use; "queue": links that had something when the server looked; "load": the share of the time
        in which it was at work.
    """
    longest = max(staleness, default=0)
    return {
        "staleness": sum(k * n for k, n in staleness.items()) / max(1, staleness.total()),
        "longest_staleness": longest,
        "staleness_histogram": [staleness[k] for k in range(longest + 1)],
        "left_out": left_out,
        **load,
    }
