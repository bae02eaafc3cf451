"""Times are per operation, of the slowest rank, with alternating contenders."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mpi4py import MPI

from hpcsgd.commands.bench.timing import Contender, interleave

pytestmark = pytest.mark.mpi


def test_contenders_alternate_and_the_slowest_rank_counts() -> None:
    comm = MPI.COMM_WORLD.Dup()
    order: list[str] = []

    def contender(name: str, seconds: float, calls: int = 1) -> Contender:
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return Contender(name, lambda: order.append(f"prepare {name}"), run, calls)

    last = comm.rank == comm.size - 1
    contenders = [contender("a", 0.03 if last else 0.0), contender("b", 0.04, calls=4)]
    seconds = interleave(comm, contenders, 3, warmups=1, timed_calls=2)

    assert order == (["prepare a", "a"] * 3 + ["prepare b", "b"] * 3) * 3
    assert {name: s.shape for name, s in seconds.items()} == {"a": (6,), "b": (6,)}
    assert (seconds["a"] >= 0.03).all(), "the time of the slowest rank is lost"
    assert (seconds["b"] >= 0.01).all() and np.median(seconds["b"]) < 0.03
    everyones = comm.allgather([s.tolist() for s in seconds.values()])
    assert all(one == everyones[0] for one in everyones)
    comm.Free()


def test_warmup_calls_are_not_timed() -> None:
    comm = MPI.COMM_WORLD.Dup()
    naps = iter([0.2, 0.0, 0.0] * 2)
    late = Contender("late", lambda: None, lambda: time.sleep(next(naps)))
    assert np.median(interleave(comm, [late], 2, warmups=1, timed_calls=2)["late"]) < 0.1
    assert next(naps, None) is None, "every call was made"
    comm.Free()


def test_preparation_is_not_timed() -> None:
    comm = MPI.COMM_WORLD.Dup()
    slow = Contender("slow to prepare", lambda: time.sleep(0.2), lambda: None)
    assert np.median(interleave(comm, [slow], 3)["slow to prepare"]) < 0.1
    comm.Free()
