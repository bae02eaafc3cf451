"""Repeated non-blocking all-gather of one control record a rank.

The messages are progressed by a poller of the communication thread; no rank blocks. All ranks get the same
records in the same order, so every decision that is a function of the records alone is equal on all ranks,
without another message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from hpcsgd.mpi.progress import POLL_INTERVAL
from hpcsgd.mpi.world import World

_IDLE_INTERVAL = 60.0  # seconds; `request` makes the thread poll at once


class ControlAllgather:
    """This rank's side of the repeated all-gather; collective when made, idle until `request`.

    The messages are control traffic: a few bytes, not counted as traffic of a method.

    Parameters
    ----------
    world
        The ranks.
    make_record
        Returns this rank's record: a structured array of shape (1,).
    on_records
        Called with the records of all ranks, of shape (ranks,); returns the seconds until the next
        all-gather, or None: idle until `request`. Must be a function of the records alone where its
        decisions must be equal on all ranks.

    Raises
    ------
    HpcsgdError
        MPI provides less than MPI_THREAD_MULTIPLE.
    """

    def __init__(
        self,
        world: World,
        make_record: Callable[[], np.ndarray],
        on_records: Callable[[np.ndarray], float | None],
    ) -> None:
        world.progress.require_thread_multiple("LASGD needs a communication thread")
        self._world, self._make_record, self._on_records = world, make_record, on_records
        self._net = world.control.dup("LASGD control records")
        self._tag = self._net.next_id() % self._net.tag_limit
        self._requested, self._due = False, 0.0
        self._source = world.rank
        self._protocol = self._repeat()
        world.progress.add_poller(self._poll)

    @property
    def missing(self) -> list[int]:
        """The rank whose message this one waits for, if any."""
        return [] if self._source == self._world.rank else [self._source]

    def request(self) -> None:
        """Take part in the next all-gather as soon as all other ranks do."""
        if not self._requested:
            self._requested = True
            self._world.progress.poll_now()

    def close(self) -> None:
        """Stop; only while all ranks are idle."""
        self._world.progress.remove_poller(self._poll)

    def _poll(self) -> float:
        return next(self._protocol)

    def _repeat(self) -> Generator[float, None, None]:
        while True:
            while not self._requested:
                yield _IDLE_INTERVAL
            while (pause := self._due - time.monotonic()) > 0:
                yield pause
            records = yield from self._gather(self._make_record())
            # Reset first: the compute thread may call `request` as soon as `on_records` has an effect.
            self._requested = False
            pause_or_none = self._on_records(records)
            if pause_or_none is not None:
                self._requested, self._due = True, time.monotonic() + pause_or_none
            yield 0.0

    def _gather(self, record: np.ndarray) -> Generator[float, None, np.ndarray]:
        """All-gather by Bruck's algorithm: rows are forwarded over distances 1, 2, 4, ..."""
        rank, size, net = self._world.rank, self._world.size, self._net
        rows, have = np.empty(size, record.dtype), 1
        rows[:1] = record
        while have < size:
            count = min(have, size - have)
            self._source = (rank + have) % size
            requests: list[Any] = [
                net.irecv(rows[have : have + count], self._source, self._tag),
                net.isend(rows[:count], (rank - have) % size, self._tag),
            ]
            while not all(request.Test() for request in requests):
                yield POLL_INTERVAL
            have += count
        self._source = rank
        return np.roll(rows, rank)
