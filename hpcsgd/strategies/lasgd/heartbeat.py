"""Repeated non-blocking all-gather of one control record a rank.

The messages are progressed by a service of the communication thread; no rank blocks. All ranks get the same
records in the same order, so every decision that is a function of the records alone is equal on all ranks,
without another message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcsgd.mpi.tasks import Steps, Wait
from hpcsgd.mpi.world import World

_IDLE_INTERVAL = 60.0  # seconds; `request` makes the thread poll at once
_ENDING_INTERVAL = 0.05  # seconds, while other ranks have not dropped their run yet


class ControlAllgather:
    """This rank's side of the repeated all-gather; collective when made, idle until `request`.

    The messages are control traffic: a few bytes, not counted as traffic of a method.

    Parameters
    ----------
    world
        The ranks.
    dtype
        The structured dtype of a record.
    make_record
        Returns this rank's record, of shape (1,).
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
        dtype: np.dtype[Any],
        make_record: Callable[[], np.ndarray],
        on_records: Callable[[np.ndarray], float | None],
    ) -> None:
        world.progress.require_thread_multiple("LASGD needs a communication thread")
        self._world = world
        #: None once this rank has dropped its run, and all ranks know that one has.
        self._callbacks: tuple[Callable[[], np.ndarray], Callable[[np.ndarray], float | None]] | None
        self._callbacks = make_record, on_records
        self._row_dtype = np.dtype([("dropped", np.bool_), ("record", dtype)])
        self._dropped = False
        self._net = world.control.dup("LASGD control records")
        self._tag = self._net.next_id() % self._net.tag_limit
        self._requested, self._due = False, 0.0
        self._source = world.rank
        self._service = world.progress.serve(self._repeat())

    @property
    def missing(self) -> list[int]:
        """The rank whose message this one waits for, if any."""
        return [] if self._source == self._world.rank else [self._source]

    @property
    def is_left(self) -> bool:
        """Whether another rank has dropped or left its run, so that nothing is decided any more."""
        return self._callbacks is None and not self._dropped

    def request(self) -> None:
        """Take part in the next all-gather as soon as all other ranks do."""
        if not self._requested:
            self._requested = True
            self._world.progress.poll_now()

    def close(self) -> None:
        """Stop; only while all ranks are idle."""
        self._world.progress.stop_serving(self._service)

    def abandon(self) -> None:
        """Stop after the run was dropped or left: local; the messages end when all ranks have dropped theirs.

        Called by the garbage collector too: takes no lock and calls no MPI.
        """
        self._dropped = self._requested = True

    def _repeat(self) -> Steps[None]:
        while True:
            while not self._requested:
                yield _IDLE_INTERVAL
            while (pause := self._due - time.monotonic()) > 0:
                yield pause
            rows = yield from self._gather(self._row())
            if rows["dropped"].all():
                return
            # Reset first: the compute thread may call `request` as soon as `on_records` has an effect.
            self._requested = False
            next_in = self._react(rows)
            if next_in is not None:
                self._requested, self._due = True, time.monotonic() + next_in
            yield None

    def _row(self) -> np.ndarray:
        row = np.zeros(1, self._row_dtype)
        row["dropped"] = self._dropped
        if self._callbacks is not None:
            row["record"] = self._callbacks[0]()
        return row

    def _react(self, rows: np.ndarray) -> float | None:
        """Return the seconds until the next all-gather; None: idle until `request`."""
        if rows["dropped"].any():
            self._callbacks = None  # of no rank from these records on, so that all have begun the same rounds
            return _ENDING_INTERVAL
        assert self._callbacks is not None
        return self._callbacks[1](np.ascontiguousarray(rows["record"]))

    def _gather(self, row: np.ndarray) -> Steps[np.ndarray]:
        """All-gather by Bruck's algorithm: rows are forwarded over distances 1, 2, 4, ..."""
        rank, size, net = self._world.rank, self._world.size, self._net
        rows, have = np.empty(size, row.dtype), 1
        rows[:1] = row
        while have < size:
            count = min(have, size - have)
            self._source = (rank + have) % size
            requests: list[Any] = [
                net.irecv(rows[have : have + count], self._source, self._tag),
                net.isend(rows[:count], (rank - have) % size, self._tag),
            ]
            yield Wait(lambda requests=requests: all(request.Test() for request in requests))  # type: ignore[misc]
            have += count
        self._source = rank
        return np.roll(rows, rank)
