"""Beats: all ranks hear the same records in the same order, whoever is late, and sleep when told to."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest

from hpcsgd.strategies.lasgd.heartbeat import Beats

RECORD = np.dtype([("rank", np.int64), ("count", np.int64), ("noise", np.float64)])


class Listener:
    """Speaks of itself, and sleeps after as many beats as all want to have heard at most."""

    def __init__(self, world: Any, seed: int) -> None:
        self.world, self.rng = world, random.Random(f"{seed} {world.rank}")
        self.heard: list[Any] = []
        self.wanted, self.count, self.asleep = 0, 0, True
        self.beats = Beats(world, self.speak, self.hear)

    def speak(self) -> np.ndarray:
        self.count += 1
        time.sleep(self.rng.random() * 2e-3)
        return np.array([(self.world.rank, self.count, self.rng.random())], RECORD)

    def hear(self, table: np.ndarray) -> float | None:
        self.heard.append(table.tolist())
        self.asleep = len(self.heard) >= self.wanted
        return None if self.asleep else self.rng.random() * 2e-3

    def listen(self, beats: int) -> None:
        self.wanted, self.asleep = len(self.heard) + beats, False
        self.beats.wake()
        self.world.progress.until(lambda: self.asleep, "some beats")


@pytest.mark.mpi
def test_all_hear_the_same_in_the_same_order(world: Any) -> None:
    # Two at once: their messages are told apart.
    first, second = Listener(world, 1), Listener(world, 2)
    for beats in (1, 4, 7):
        time.sleep(first.rng.random() * 5e-3)
        first.listen(beats)
        second.listen(3)
    for listener, beats in ((first, 12), (second, 9)):
        assert len(listener.heard) == beats
        assert all(heard == listener.heard for heard in world.gather(listener.heard))
        for number, table in enumerate(listener.heard, 1):
            assert [row[:2] for row in table] == [(rank, number) for rank in range(world.size)]
        listener.beats.close()


@pytest.mark.mpi
def test_they_do_not_count_as_what_a_method_sends(world: Any) -> None:
    before = world.traffic.sent
    listener = Listener(world, 3)
    listener.listen(5)
    assert world.traffic.sent == before
    assert listener.beats.missing == []
    listener.beats.close()


@pytest.mark.mpi(min_size=2)
def test_whom_a_beat_waits_for_is_known(world: Any) -> None:
    listener = Listener(world, 4)
    if world.rank == 0:
        world.gather("before rank 0 takes part")
        listener.listen(1)
    else:
        listener.wanted, listener.asleep = 1, False
        listener.beats.wake()
        world.progress.until(lambda: listener.beats.missing != [], "the first message of a beat")
        if world.rank == world.size - 1:
            assert listener.beats.missing == [0]
        world.gather("before rank 0 takes part")
        world.progress.until(lambda: listener.asleep, "a beat")
    assert listener.beats.missing == []
    listener.beats.close()
