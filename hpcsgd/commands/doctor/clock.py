"""Checks the offsets between the wall clocks of the nodes, and the resolution of their monotonic clocks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding
from hpcsgd.commands.doctor.ranks import ExaminedJob

_ROUND_TRIPS = 5
_MAX_OFFSET = 1.0  # seconds


def collect(job: ExaminedJob) -> Facts:
    """Rank 0 requests the time from the first rank of each other node, one after the other."""
    skews: dict[int, tuple[float, float]] = {}
    request = np.zeros(1)
    for leader in (node[0] for node in job.nodes[1:]):
        if job.rank == 0:
            skews[leader] = min(
                (_measure_offset(job, leader) for _ in range(_ROUND_TRIPS)), key=lambda found: found[1]
            )
        elif job.rank == leader:
            for _ in range(_ROUND_TRIPS):
                job.receive(request, 0)
                job.send(np.array([time.time()]), 0)
    return {"skews": skews, "resolution": time.get_clock_info("monotonic").resolution}


def _measure_offset(job: ExaminedJob, peer: int) -> tuple[float, float]:
    """Seconds by which the peer's clock is ahead, and the round-trip time, half of which bounds the error."""
    message = np.zeros(1)
    started = time.time()
    job.send(message, peer)
    job.receive(message, peer)
    ended = time.time()
    return float(message[0]) - (started + ended) / 2, ended - started


def describe(ranks: FactsByRank) -> Iterator[str]:
    skews = ranks[0]["skews"]
    resolution = f"monotonic clock: resolution {1e9 * max(facts['resolution'] for facts in ranks):g} ns"
    if not skews:
        yield f"{resolution}; one node, one wall clock"
        return
    rank, (ahead, trip) = max(skews.items(), key=lambda item: abs(item[1][0]))
    yield (
        f"{resolution}; wall clocks of {len(skews) + 1} nodes: largest offset to rank 0 "
        f"{1e3 * abs(ahead):.2f} ms (rank {rank} on {ranks[rank]['host']}; ± {1e3 * trip / 2:.2f} ms)"
    )


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    for rank, (ahead, _) in ranks[0]["skews"].items():
        if abs(ahead) > _MAX_OFFSET:
            yield Finding(
                "warning",
                f"the clock of {ranks[rank]['host']} (rank {rank}) is {abs(ahead):.1f} s "
                f"{'ahead of' if ahead > 0 else 'behind'} that of {ranks[0]['host']} (rank 0)",
                "synchronise the clocks with chrony or ntpd; until then times in logs and of files cannot be "
                "compared between nodes",
            )


CHECK = Check("clock", collect, describe, diagnose)
