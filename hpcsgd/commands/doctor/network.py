"""Latency and bandwidth between two ranks of a node, and between neighbouring nodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks
from hpcsgd.commands.doctor.ranks import Job

Pair = tuple[int, int]

_SMALL, _MIDDLE, _LARGE = 8, 64 * 2**10, 4 * 2**20
_SECONDS = 0.3  # for the round trips of one size, about
_LONGEST_TRIP = 1.0  # seconds; a slower link is measured with the middle size
_SLOW = 3.0  # times slower than the median of the links


def inside(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Rounds of pairs that talk at the same time: the first two ranks of each node."""
    return [[(node[0], node[1]) for node in nodes if len(node) > 1]]


def between(nodes: Sequence[Sequence[int]]) -> list[list[Pair]]:
    """Rounds of pairs: the first ranks of nodes that follow each other, so each node talks to two."""
    first = [node[0] for node in nodes]
    neighbours = list(zip(first, first[1:] + first[:1], strict=True)) if len(first) > 2 else [tuple(first)]
    pairs = [(pair[0], pair[1]) for pair in neighbours if len(pair) > 1]
    odd = [pairs.pop()] if len(pairs) % 2 and len(pairs) > 1 else []
    return [each for each in (pairs[::2], pairs[1::2], odd) if each]


def gather(job: Job) -> Facts:
    found: dict[str, dict[Pair, tuple[float, float]]] = {"inside": {}, "between": {}}
    for kind, rounds in (("inside", inside(job.nodes)), ("between", between(job.nodes))):
        for pairs in rounds:
            job.barrier()
            for asker, answerer in pairs:
                if job.rank == asker:
                    found[kind][asker, answerer] = _measure(job, answerer)
                elif job.rank == answerer:
                    _answer(job, asker)
    return {"links": found}


def _measure(job: Job, peer: int) -> tuple[float, float]:
    """Seconds that a small message takes one way, and bytes a second of a large one."""
    small = _trips(job, peer, _SMALL, 100)
    middle = _trips(job, peer, _MIDDLE, 5)
    size, seconds = _MIDDLE, middle
    expected = middle * _LARGE / _MIDDLE
    turns = 0 if expected > _LONGEST_TRIP else max(3, min(20, int(_SECONDS / expected)))
    if turns:
        size, seconds = _LARGE, _trips(job, peer, _LARGE, turns)
    else:
        _trips(job, peer, _LARGE, 0)
    return small / 2, 2 * size / seconds


def _trips(job: Job, peer: int, size: int, turns: int) -> float:
    """Median seconds of a round trip; the first one is not counted."""
    job.send(np.array([turns], np.int64), peer)
    buffer, seconds = np.zeros(size, np.uint8), []
    for _ in range(turns):
        started = time.perf_counter()
        job.send(buffer, peer)
        job.receive(buffer, peer)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) if turns else 0.0


def _answer(job: Job, peer: int) -> None:
    for size in (_SMALL, _MIDDLE, _LARGE):
        turns, buffer = np.zeros(1, np.int64), np.zeros(size, np.uint8)
        job.receive(turns, peer)
        for _ in range(int(turns[0])):
            job.receive(buffer, peer)
            job.send(buffer, peer)


def show(ranks: Ranks) -> Iterator[str]:
    kinds = {"two ranks of a node": "inside", "nodes next to each other": "between"}
    found = {what: _of(ranks, kind) for what, kind in kinds.items()}
    yield from (_text(what, links, ranks) for what, links in found.items() if links)
    if not any(found.values()):
        yield "one rank, so none"


def _of(ranks: Ranks, kind: str) -> dict[Pair, tuple[float, float]]:
    return {pair: link for facts in ranks for pair, link in facts["links"][kind].items()}


def _text(what: str, links: dict[Pair, tuple[float, float]], ranks: Ranks) -> str:
    latency = statistics.median(seconds for seconds, _ in links.values())
    rate = statistics.median(rate for _, rate in links.values())
    text = f"{what}: {1e6 * latency:.1f} µs, {_rate(rate)}"
    if len(links) == 1:
        return text
    worst = min(links, key=lambda pair: links[pair][1])
    seconds, slowest = links[worst]
    return (
        f"{text} (median of {len(links)}); slowest {1e6 * seconds:.1f} µs, {_rate(slowest)}, "
        f"{_ends(worst, ranks)}"
    )


def _rate(bytes_a_second: float) -> str:
    return f"{bytes_a_second / 1e9:.2f} GB/s" if bytes_a_second >= 1e8 else f"{bytes_a_second / 1e6:.2f} MB/s"


def _ends(pair: Pair, ranks: Ranks) -> str:
    return f"{ranks[pair[0]]['host']} (rank {pair[0]}) to {ranks[pair[1]]['host']} (rank {pair[1]})"


def judge(ranks: Ranks) -> Iterator[Finding]:
    links = _of(ranks, "between")
    if len(links) < 3:
        return
    usual = statistics.median(rate for _, rate in links.values())
    for pair, (_, rate) in links.items():
        if rate * _SLOW < usual:
            yield Finding(
                "warning",
                f"the link {_ends(pair, ranks)} gives {_rate(rate)}, others {_rate(usual)}",
                "leave the slower node out (srun --exclude), and have its port, cable and adapter looked at",
            )


CHECK = Check("links", gather, show, judge)
