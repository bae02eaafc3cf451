"""Timing of several contenders in alternation, so that a disturbance of the machine affects all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Contender:
    """An operation that is timed on all ranks at once.

    `prepare` is called before each call of `run`, untimed; with `calls` operations in one `run`, times are
    per operation.
    """

    name: str
    prepare: Callable[[], None]
    run: Callable[[], None]
    calls: int = 1


def interleave(
    comm: Any, contenders: Sequence[Contender], repeats: int, warmups: int = 1, timed_calls: int = 3
) -> dict[str, np.ndarray]:
    """Time the contenders in alternation: A B C A B C and so on.

    Parameters
    ----------
    comm
        An mpi4py communicator of the ranks, with nothing in flight.
    contenders
        The same on every rank.
    repeats
        Number of passes over the contenders, at least 1.
    warmups
        Untimed calls of a contender at the start of its turn, because the first one finds the caches as the
        previous contender left them. Default 1.
    timed_calls
        Timed calls per turn. Default 3.

    Returns
    -------
    dict
        For each name the seconds of the slowest rank in each call, (repeats * timed_calls,), on every rank.
    """
    from mpi4py import MPI

    seconds = np.empty((repeats * timed_calls, len(contenders)))
    for repeat in range(repeats):
        for index, contender in enumerate(contenders):
            for call in range(-warmups, timed_calls):
                contender.prepare()
                barrier(comm)
                started = time.perf_counter()
                contender.run()
                if call >= 0:
                    elapsed = (time.perf_counter() - started) / contender.calls
                    seconds[repeat * timed_calls + call, index] = elapsed
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return {c.name: seconds[:, index] for index, c in enumerate(contenders)}


def barrier(comm: Any) -> None:
    """Wait for all ranks, yielding the core to ranks that have not arrived.

    It belongs to no contender. A barrier that spins would release the ranks a scheduler tick apart where
    ranks outnumber cores.
    """
    request = comm.Ibarrier()
    while not request.Test():
        os.sched_yield()


def with_barrier(comm: Any, run: Callable[[], None]) -> Callable[[], None]:
    """`run` followed by a barrier: where ranks share cores, one may finish before another begins."""

    def run_and_wait() -> None:
        run()
        barrier(comm)

    return run_and_wait
