"""How far the wall clocks of the nodes are apart, and how fine their steady clocks are."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks
from hpcsgd.commands.doctor.ranks import Job

_TRIPS = 5
_APART = 1.0  # seconds


def gather(job: Job) -> Facts:
    """Rank 0 asks the first rank of each other node for the time; each waits for its turn."""
    skews: dict[int, tuple[float, float]] = {}
    answer = np.zeros(1)
    for leader in (node[0] for node in job.nodes[1:]):
        if job.rank == 0:
            skews[leader] = min((_ask(job, leader) for _ in range(_TRIPS)), key=lambda found: found[1])
        elif job.rank == leader:
            for _ in range(_TRIPS):
                job.receive(answer, 0)
                job.send(np.array([time.time()]), 0)
    return {"skews": skews, "resolution": time.get_clock_info("monotonic").resolution}


def _ask(job: Job, peer: int) -> tuple[float, float]:
    """Seconds that its clock is ahead, and the round trip, of which half is the error at most."""
    answer = np.zeros(1)
    started = time.time()
    job.send(answer, peer)
    job.receive(answer, peer)
    ended = time.time()
    return float(answer[0]) - (started + ended) / 2, ended - started


def show(ranks: Ranks) -> Iterator[str]:
    skews = ranks[0]["skews"]
    fine = f"steady clock: steps of {1e9 * max(facts['resolution'] for facts in ranks):g} ns"
    if not skews:
        yield f"{fine}; one node, one wall clock"
        return
    rank, (ahead, trip) = max(skews.items(), key=lambda item: abs(item[1][0]))
    yield (
        f"{fine}; wall clocks of {len(skews) + 1} nodes at most {1e3 * abs(ahead):.2f} ms from rank 0's "
        f"(rank {rank} on {ranks[rank]['host']}; ± {1e3 * trip / 2:.2f} ms)"
    )


def judge(ranks: Ranks) -> Iterator[Finding]:
    for rank, (ahead, _) in ranks[0]["skews"].items():
        if abs(ahead) > _APART:
            yield Finding(
                "warning",
                f"the clock of {ranks[rank]['host']} (rank {rank}) is {abs(ahead):.1f} s "
                f"{'ahead of' if ahead > 0 else 'behind'} that of {ranks[0]['host']} (rank 0)",
                "let chrony or ntpd set it: times in logs and of files do not compare until then",
            )


CHECK = Check("clock", gather, show, judge)
