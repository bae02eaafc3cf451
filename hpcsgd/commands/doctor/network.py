"""Measures latency and bandwidth between two ranks of each node, and between neighbouring nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding, ranks_by_node
from hpcsgd.commands.doctor.cores import cores_of_node
from hpcsgd.commands.doctor.ranks import ExaminedJob

Pair = tuple[int, int]

_SMALL, _MIDDLE, _LARGE = 8, 64 * 2**10, 4 * 2**20
_SECONDS = 0.3  # approximate time for the round trips of one size
_MAX_ROUND_TRIP = 1.0  # seconds; a slower link is measured with the middle size
_SLOWDOWN = 3.0  # relative to the median of the links
# Seconds: some ten times the usual latency of shared memory with the pauses of a scheduler, and of TCP.
_SLOW_INSIDE, _SLOW_BETWEEN = 50e-6, 500e-6


def pairs_inside_nodes(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Lists of pairs that are measured at the same time: the first two ranks of each node."""
    return [[(node[0], node[1]) for node in nodes if len(node) > 1]]


def pairs_between_nodes(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Lists of pairs that are measured at the same time: the first ranks of neighbouring nodes on a ring."""
    first = [node[0] for node in nodes]
    neighbours = list(zip(first, first[1:] + first[:1], strict=True)) if len(first) > 2 else [tuple(first)]
    pairs = [(pair[0], pair[1]) for pair in neighbours if len(pair) > 1]
    odd = [pairs.pop()] if len(pairs) % 2 and len(pairs) > 1 else []
    return [each for each in (pairs[::2], pairs[1::2], odd) if each]


def collect(job: ExaminedJob) -> Facts:
    found: dict[str, dict[Pair, tuple[float, float]]] = {"inside": {}, "between": {}}
    for kind, pair_sets in (
        ("inside", pairs_inside_nodes(job.nodes)),
        ("between", pairs_between_nodes(job.nodes)),
    ):
        for pairs in pair_sets:
            job.barrier()
            for first, second in pairs:
                if job.rank == first:
                    found[kind][first, second] = _measure(job, second)
                elif job.rank == second:
                    _echo(job, first)
    return {"links": found}


def _measure(job: ExaminedJob, peer: int) -> tuple[float, float]:
    """One-way latency of a small message in seconds, and bandwidth of a large one in bytes per second."""
    small = _round_trip(job, peer, _SMALL, 100)
    middle = _round_trip(job, peer, _MIDDLE, 5)
    size, seconds = _MIDDLE, middle
    expected = middle * _LARGE / _MIDDLE
    trips = 0 if expected > _MAX_ROUND_TRIP else max(3, min(20, int(_SECONDS / expected)))
    if trips:
        size, seconds = _LARGE, _round_trip(job, peer, _LARGE, trips)
    else:
        _round_trip(job, peer, _LARGE, 0)
    return small / 2, 2 * size / seconds


def _round_trip(job: ExaminedJob, peer: int, size: int, trips: int) -> float:
    """Median seconds of a round trip, without the first one."""
    job.send(np.array([trips], np.int64), peer)
    buffer, seconds = np.zeros(size, np.uint8), []
    for _ in range(trips):
        started = time.perf_counter()
        job.send(buffer, peer)
        job.receive(buffer, peer)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) if trips else 0.0


def _echo(job: ExaminedJob, peer: int) -> None:
    for size in (_SMALL, _MIDDLE, _LARGE):
        trips, buffer = np.zeros(1, np.int64), np.zeros(size, np.uint8)
        job.receive(trips, peer)
        for _ in range(int(trips[0])):
            job.receive(buffer, peer)
            job.send(buffer, peer)


def describe(ranks: FactsByRank) -> Iterator[str]:
    kinds = {"two ranks of a node": "inside", "neighbouring nodes": "between"}
    found = {name: _links_of(ranks, kind) for name, kind in kinds.items()}
    yield from (_text(name, links, ranks) for name, links in found.items() if links)
    if not any(found.values()):
        yield "none: one rank"


def _links_of(ranks: FactsByRank, kind: str) -> dict[Pair, tuple[float, float]]:
    return {pair: link for facts in ranks for pair, link in facts["links"][kind].items()}


def _text(name: str, links: dict[Pair, tuple[float, float]], ranks: FactsByRank) -> str:
    latency = statistics.median(seconds for seconds, _ in links.values())
    rate = statistics.median(rate for _, rate in links.values())
    text = f"{name}: latency {1e6 * latency:.1f} µs, bandwidth {_rate(rate)}"
    if len(links) == 1:
        return text
    worst = min(links, key=lambda pair: links[pair][1])
    seconds, slowest = links[worst]
    return (
        f"{text} (medians of {len(links)} links); slowest link: {1e6 * seconds:.1f} µs, {_rate(slowest)}, "
        f"{_ends(worst, ranks)}"
    )


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.2f} GB/s" if bytes_a_second >= 1e8 else f"{bytes_a_second / 1e6:.2f} MB/s"


def _ends(pair: Pair, ranks: FactsByRank) -> str:
    return f"{ranks[pair[0]]['host']} (rank {pair[0]}) to {ranks[pair[1]]['host']} (rank {pair[1]})"


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    yield from _latencies(ranks)
    links = _links_of(ranks, "between")
    if len(links) < 3:
        return
    usual = statistics.median(rate for _, rate in links.values())
    for pair, (_, rate) in links.items():
        if rate * _SLOWDOWN < usual:
            yield Finding(
                "warning",
                f"the link {_ends(pair, ranks)} has a bandwidth of {_rate(rate)}, the median is "
                f"{_rate(usual)}",
                "exclude the slower node (srun --exclude), and have its port, cable and adapter checked",
            )


def _latencies(ranks: FactsByRank) -> Iterator[Finding]:
    """The slowest link of each kind, if its latency is far above what such a link can have."""
    nodes = ranks_by_node(ranks)
    # Ranks that take turns on a core wait for the scheduler; the check of cores names these.
    crowded = {node for node, members in nodes.items() if len(members) > cores_of_node(members, ranks)}
    for kind, most, name, usual, fix in (
        (
            "inside",
            _SLOW_INSIDE,
            "inside a node",
            "0.2 to 5 µs",
            "end other programs on the node; else see whether MPI has its shared memory (MPICH: UCX_TLS and "
            "FI_PROVIDER not set; Open MPI: --mca btl self,sm)",
        ),
        (
            "between",
            _SLOW_BETWEEN,
            "between nodes",
            "1 to 50 µs",
            "let MPI use the fast network (MPICH: UCX_NET_DEVICES, FI_PROVIDER; Open MPI: --mca "
            "btl_tcp_if_include), and request nodes that are near each other",
        ),
    ):
        latencies = {
            pair: latency
            for pair, (latency, _) in _links_of(ranks, kind).items()
            if latency > most and not crowded & {ranks[rank]["node"] for rank in pair}
        }
        if latencies:
            worst = max(latencies, key=latencies.__getitem__)
            yield Finding(
                "warning",
                f"the latency {name} is {1e6 * latencies[worst]:,.0f} µs, from {_ends(worst, ranks)}; usual "
                f"is {usual}",
                fix,
            )


CHECK = Check("links", collect, describe, diagnose)
