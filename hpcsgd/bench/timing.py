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


def interleave(comm: Any, contenders: Sequence[Contender], rounds: int) -> dict[str, np.ndarray]:
    """Time the contenders in turns, A B C A B C and so on.

    Parameters
    ----------
    comm
        An mpi4py communicator of the ranks, with nothing in flight.
    contenders
        The same on every rank.
    rounds
        Times each of them is timed, at least 1.

    Returns
    -------
    dict
        For each name the seconds of the slowest rank in each round, (rounds,), on every rank.
    """
    from mpi4py import MPI

    seconds = np.empty((rounds, len(contenders)))
    for row in seconds:
        for index, contender in enumerate(contenders):
            contender.prepare()
            barrier(comm)
            started = time.perf_counter()
            contender.run()
            row[index] = (time.perf_counter() - started) / contender.calls
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


def check_positive(option: str, values: Sequence[float]) -> None:
    """Raise `BadOption` where a value is not above 0, or there is none."""
    if not values or not all(value > 0 for value in values):
        raise BadOption(option, expected="values above 0", got=values, everywhere=True)
