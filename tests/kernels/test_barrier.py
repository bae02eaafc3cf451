"""The barrier in shared memory, with threads as ranks: the kernels run without the GIL."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from hpcsgd.kernels.sync import barrier

pytestmark = pytest.mark.host("a barrier in memory of the host")

_GENERATION = barrier.STRIDE


def flags_of(ranks: int) -> np.ndarray:
    return np.zeros(barrier.flags_size(ranks) // 4, np.int32)


def run(ranks: int, rounds: int, flags: np.ndarray, spins: int) -> np.ndarray:
    """Every rank's rounds; fails where one is let through before all have arrived."""
    counts, early = np.zeros((ranks, 32), np.int64), []

    def rank_of(me: int) -> None:
        for number in range(1, rounds + 1):
            counts[me, 0] = number
            target = barrier.arrive(flags, ranks, me)
            while not barrier.wait(flags, target, spins, 10_000):
                pass
            if counts[:, 0].min() < number:
                early.append((me, number))

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not early
    return flags


@pytest.mark.parametrize(("ranks", "spins"), [(1, 0), (2, 0), (2, 200), (3, 50), (5, 0)])
def test_no_rank_passes_before_all_have_arrived(ranks: int, spins: int) -> None:
    rounds = 2000
    flags = run(ranks, rounds, flags_of(ranks), spins)
    assert flags[_GENERATION] == rounds
    assert flags[0] == 0 and flags[2 * barrier.STRIDE] == 0, "no rank inside, no rank asleep"


def test_the_generation_wraps_around() -> None:
    flags = flags_of(3)
    near = np.int32(2**31 - 50)
    flags[_GENERATION] = near
    flags[3 * barrier.STRIDE :: barrier.STRIDE] = near
    run(3, 100, flags, 10)
    assert flags[_GENERATION] == -(2**31) + 50


@pytest.mark.parametrize("start", [0, 2**31 - 2, 2**31 - 1, -(2**31)])
def test_the_missing_are_named(start: int) -> None:
    flags = flags_of(4)
    flags[_GENERATION] = start
    flags[3 * barrier.STRIDE :: barrier.STRIDE] = start
    for come, missing in [(2, [0, 1, 3]), (0, [1, 3]), (3, [1])]:
        target = int(barrier.arrive(flags, 4, come))
        assert not barrier.wait(flags, target, 1, 100)
        assert barrier.missing_ranks(flags, 4, target) == missing
    barrier.arrive(flags, 4, 1)
    assert barrier.wait(flags, target, 1, 100)
    assert barrier.missing_ranks(flags, 4, target) == []


def test_a_wait_ends_in_time_and_a_sleeper_is_woken() -> None:
    flags = flags_of(2)
    target = barrier.arrive(flags, 2, 0)
    started = time.monotonic()
    assert not barrier.wait(flags, target, 10, 50_000)
    assert time.monotonic() - started < 10
    threading.Timer(0.1, lambda: barrier.arrive(flags, 2, 1)).start()
    started = time.monotonic()
    while not barrier.wait(flags, target, 10, 30_000_000):
        assert time.monotonic() - started < 20
    assert time.monotonic() - started < 10, "woken, not timed out"
