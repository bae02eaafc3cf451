"""Counters and locks in shared memory."""

from __future__ import annotations

import threading
import time

import numpy as np

from hpcsgd.kernels.sync import ticket_lock

SLICE = 50_000


def test_a_lock_is_held_by_one_at_a_time_and_none_is_forgotten() -> None:
    words, total, threads, turns = np.zeros(ticket_lock.LOCK_WORDS, np.int32), [0], 3, 15

    def work() -> None:
        for _ in range(turns):
            ticket = ticket_lock.draw(words, 0)
            while not ticket_lock.mine(words, 0, ticket, 10, SLICE):
                pass
            seen = total[0]
            time.sleep(1e-5)
            total[0] = seen + 1
            ticket_lock.leave(words, 0, ticket)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert total[0] == threads * turns


def test_who_waits_for_a_count_wakes_when_it_is_reached() -> None:
    words = np.zeros(ticket_lock.COUNT_WORDS, np.int32)
    assert not ticket_lock.reached(words, 0, 1, 10, 1000)
    woken = []
    sleeper = threading.Thread(target=lambda: woken.append(ticket_lock.reached(words, 0, 2, 10, 20_000_000)))
    sleeper.start()
    time.sleep(0.02)
    ticket_lock.advance(words, 0, 3)
    sleeper.join(10)
    assert woken == [True] and ticket_lock.reached(words, 0, 3, 0, 0) and words[ticket_lock.STRIDE] == 0


def test_counts_go_on_beyond_the_largest_int32() -> None:
    words = np.zeros(ticket_lock.COUNT_WORDS, np.int32)
    words[0] = 2**31 - 1
    wrapped = np.int32(-(2**31))
    assert not ticket_lock.reached(words, 0, wrapped, 0, 0)
    ticket_lock.advance(words, 0, wrapped)
    assert ticket_lock.reached(words, 0, wrapped, 0, 0) and ticket_lock.reached(words, 0, 2**31 - 1, 0, 0)
