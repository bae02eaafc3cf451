"""Counts and ticket locks in shared memory."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from hpcsgd.kernels.sync import ticket_lock

pytestmark = pytest.mark.host("a lock in memory of the host")
SLICE = 50_000


def test_a_lock_is_held_by_one_thread_at_a_time_and_every_ticket_is_served() -> None:
    words, total, threads, turns = np.zeros(ticket_lock.LOCK_WORDS, np.int32), [0], 3, 15

    def work() -> None:
        for _ in range(turns):
            ticket = ticket_lock.take_ticket(words, 0)
            while not ticket_lock.acquire(words, 0, ticket, 10, SLICE):
                pass
            seen = total[0]
            time.sleep(1e-5)
            total[0] = seen + 1
            ticket_lock.release(words, 0, ticket)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert total[0] == threads * turns


def test_a_waiter_wakes_when_the_count_is_reached() -> None:
    words = np.zeros(ticket_lock.COUNT_WORDS, np.int32)
    assert not ticket_lock.wait_for_count(words, 0, 1, 10, 1000)
    woken = []
    sleeper = threading.Thread(
        target=lambda: woken.append(ticket_lock.wait_for_count(words, 0, 2, 10, 20_000_000))
    )
    sleeper.start()
    time.sleep(0.02)
    ticket_lock.set_count(words, 0, 3)
    sleeper.join(10)
    assert (
        woken == [True] and ticket_lock.wait_for_count(words, 0, 3, 0, 0) and words[ticket_lock.STRIDE] == 0
    )


def test_counts_go_on_beyond_the_largest_int32() -> None:
    words = np.zeros(ticket_lock.COUNT_WORDS, np.int32)
    words[0] = 2**31 - 1
    wrapped = np.int32(-(2**31))
    assert not ticket_lock.wait_for_count(words, 0, wrapped, 0, 0)
    ticket_lock.set_count(words, 0, wrapped)
    assert ticket_lock.wait_for_count(words, 0, wrapped, 0, 0) and ticket_lock.wait_for_count(
        words, 0, 2**31 - 1, 0, 0
    )
