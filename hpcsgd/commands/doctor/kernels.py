"""Checks that host kernels compile, and that compiled kernels are cached for the next process."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding, lines_by_value, name_ranks
from hpcsgd.commands.doctor.ranks import ExaminedJob


def collect(_: ExaminedJob) -> Facts:
    started = time.monotonic()
    from hpcsgd.kernels.jit import cache_folder
    from hpcsgd.kernels.sync import ticket_lock

    words = np.zeros(ticket_lock.COUNT_WORDS, np.int32)
    ticket_lock.set_count(words, 0, 3)
    return {
        "compiled": int(words[0]) == 3,
        "cache": cache_folder(ticket_lock.set_count),
        "kernel seconds": time.monotonic() - started,
    }


def describe(ranks: FactsByRank) -> Iterator[str]:
    slowest = max(facts["kernel seconds"] for facts in ranks)
    yield f"host: compiled or loaded in {slowest:.1f} s"
    yield from (f"cache: {line}" for line in lines_by_value(ranks, lambda facts: facts["cache"] or "none"))


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    wrong = [rank for rank, facts in enumerate(ranks) if not facts["compiled"]]
    if wrong:
        yield Finding(
            "error",
            f"a compiled kernel gives wrong results on {name_ranks(wrong, ranks)}",
            "remove the cache folder shown above, and install the numba version of constraints.txt",
        )
    without = [rank for rank, facts in enumerate(ranks) if not facts["cache"]]
    if without:
        yield Finding(
            "warning",
            f"no folder for compiled kernels is writable on {name_ranks(without, ranks)}: every process of "
            "every run compiles them again",
            "export NUMBA_CACHE_DIR=FOLDER with a folder that every rank can write",
        )


CHECK = Check("kernels", collect, describe, diagnose)
