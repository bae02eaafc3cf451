"""Whether host kernels compile, and whether the next process finds them compiled."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, group, name_of, shown
from hpcsgd.commands.doctor.ranks import Job


def gather(_: Job) -> Facts:
    started = time.monotonic()
    from hpcsgd.kernels.jit import cache_of
    from hpcsgd.kernels.sync import ticket_lock

    words = np.zeros(ticket_lock.COUNT_WORDS, np.int32)
    ticket_lock.advance(words, 0, 3)
    return {
        "compiled": int(words[0]) == 3,
        "cache": cache_of(ticket_lock.advance),
        "kernel seconds": time.monotonic() - started,
    }


def show(ranks: Ranks) -> Iterator[str]:
    slowest = max(facts["kernel seconds"] for facts in ranks)
    yield f"host: compiled or loaded in {slowest:.1f} s"
    yield from (
        f"cache: {line}" for line in shown(group(ranks, lambda facts: facts["cache"] or "none"), ranks)
    )


def judge(ranks: Ranks) -> Iterator[Finding]:
    wrong = [rank for rank, facts in enumerate(ranks) if not facts["compiled"]]
    if wrong:
        yield Finding(
            "error",
            f"a compiled kernel gives wrong numbers on {name_of(wrong, ranks)}",
            "remove the cache's folder, and install the numba of constraints.txt",
        )
    without = [rank for rank, facts in enumerate(ranks) if not facts["cache"]]
    if without:
        yield Finding(
            "warning",
            f"no folder for compiled kernels can be written on {name_of(without, ranks)}: each process of "
            "each run compiles them again",
            "export NUMBA_CACHE_DIR=FOLDER, one that every rank may write",
        )


CHECK = Check("kernels", gather, show, judge)
