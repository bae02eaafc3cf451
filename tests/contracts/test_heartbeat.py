"""`ControlAllgather`: all ranks get the same records in the same order, and are idle when requested."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest

from hpcsgd.strategies.lasgd.heartbeat import ControlAllgather

RECORD = np.dtype([("rank", np.int64), ("count", np.int64), ("noise", np.float64)])


class Participant:
    """Contributes records of its own, and is idle after a given number of all-gathers."""

    def __init__(self, world: Any, seed: int) -> None:
        self.world, self.rng = world, random.Random(f"{seed} {world.rank}")
        self.tables: list[Any] = []
        self.wanted, self.count, self.idle = 0, 0, True
        self.control = ControlAllgather(world, RECORD, self.make_record, self.on_records)

    def make_record(self) -> np.ndarray:
        self.count += 1
        time.sleep(self.rng.random() * 2e-3)
        return np.array([(self.world.rank, self.count, self.rng.random())], RECORD)

    def on_records(self, table: np.ndarray) -> float | None:
        self.tables.append(table.tolist())
        self.idle = len(self.tables) >= self.wanted
        return None if self.idle else self.rng.random() * 2e-3

    def gather(self, times: int) -> None:
        self.wanted, self.idle = len(self.tables) + times, False
        self.control.request()
        self.world.progress.until(lambda: self.idle, "some all-gathers")


@pytest.mark.mpi
def test_all_ranks_get_the_same_records_in_the_same_order(world: Any) -> None:
    # Two at once: their messages have different tags.
    first, second = Participant(world, 1), Participant(world, 2)
    for times in (1, 4, 7):
        time.sleep(first.rng.random() * 5e-3)
        first.gather(times)
        second.gather(3)
    for participant, times in ((first, 12), (second, 9)):
        assert len(participant.tables) == times
        assert all(tables == participant.tables for tables in world.gather(participant.tables))
        for number, table in enumerate(participant.tables, 1):
            assert [row[:2] for row in table] == [(rank, number) for rank in range(world.size)]
        participant.control.close()


@pytest.mark.mpi
def test_control_records_are_not_counted_as_traffic(world: Any) -> None:
    before = world.traffic.sent
    participant = Participant(world, 3)
    participant.gather(5)
    assert world.traffic.sent == before
    assert participant.control.missing == []
    participant.control.close()


@pytest.mark.mpi(min_size=2)
def test_missing_is_the_rank_that_an_allgather_waits_for(world: Any) -> None:
    participant = Participant(world, 4)
    if world.rank == 0:
        world.gather("before rank 0 takes part")
        participant.gather(1)
    else:
        participant.wanted, participant.idle = 1, False
        participant.control.request()
        world.progress.until(lambda: participant.control.missing != [], "the first message")
        if world.rank == world.size - 1:
            assert participant.control.missing == [0]
        world.gather("before rank 0 takes part")
        world.progress.until(lambda: participant.idle, "an all-gather")
    assert participant.control.missing == []
    participant.control.close()
