"""Times of several contenders, taken in turns: what disturbs the machine disturbs them all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcsgd.errors import BadOption


@dataclass
class Contender:
    """Something to be timed on all ranks at once.

    Attributes
    ----------
    name
        Of the method.
    prepare
        Called before each timed call, outside of the time.
    run
        What is timed.
    calls
        Operations in one `run`; times are per operation.
    """

    name: str
    prepare: Callable[[], None]
    run: Callable[[], None]
    calls: int = 1


def interleave(
    comm: Any, contenders: Sequence[Contender], rounds: int, uncounted: int = 1, takes: int = 3
) -> dict[str, np.ndarray]:
    """Time the contenders in turns, A B C A B C and so on.

    Parameters
    ----------
    comm
        An mpi4py communicator of the ranks, with nothing in flight.
    contenders
        The same on every rank.
    rounds
        Turns of each of them, at least 1.
    uncounted
        Calls at the start of a turn that are not timed: the first one finds the caches as the contender
        before left them. Default 1.
    takes
        Calls of a turn that are. Default 3.

    Returns
    -------
    dict
        For each name the seconds of the slowest rank in each call, (rounds * takes,), on every rank.
    """
    from mpi4py import MPI

    seconds = np.empty((rounds * takes, len(contenders)))
    for turn in range(rounds):
        for index, contender in enumerate(contenders):
            for take in range(-uncounted, takes):
                contender.prepare()
                barrier(comm)
                started = time.perf_counter()
                contender.run()
                if take >= 0:
                    taken = (time.perf_counter() - started) / contender.calls
                    seconds[turn * takes + take, index] = taken
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return {c.name: seconds[:, index] for index, c in enumerate(contenders)}


def barrier(comm: Any) -> None:
    """Wait for all ranks, and leave the core to those that are not there yet.

    It is no contender's own. One that spins would let ranks go a scheduler's tick apart where these
    outnumber the cores.
    """
    request = comm.Ibarrier()
    while not request.Test():
        os.sched_yield()


def together(comm: Any, run: Callable[[], None]) -> Callable[[], None]:
    """`run`, until all ranks are through: where they share cores, one may be over before the next begins."""

    def run_and_wait() -> None:
        run()
        barrier(comm)

    return run_and_wait


def check_positive(option: str, values: Sequence[float]) -> None:
    """Raise `BadOption` where a value is not above 0, or there is none."""
    if not values or not all(value > 0 for value in values):
        raise BadOption(option, expected="values above 0", got=values, everywhere=True)
