"""Ranks tell each other a few numbers, again and again, and nobody waits for it.

A beat is an all-gather of one record a rank, by messages that a service of the communication thread looks
after. All ranks hear the same tables in the same order: whatever is decided from them alone, all decide
alike, without another message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from hpcsgd.mpi.progress import LISTENING
from hpcsgd.mpi.world import World

_ASLEEP = 60.0  # seconds; whoever wakes it has it called


class Beats:
    """This rank's part in the beats; collective when made, asleep until `wake`.

    They are questions of a few bytes, which do not count as what a method sends.

    Parameters
    ----------
    world
        The ranks.
    speak
        Gives this rank's record: a structured array of one element.
    hear
        Takes all ranks' records, (ranks,), and says in how many seconds the next beat begins; None: asleep
        until `wake`. What it decides from these alone, all ranks decide alike.

    Raises
    ------
    HpcsgdError
        Without MPI_THREAD_MULTIPLE.
    """

    def __init__(
        self, world: World, speak: Callable[[], np.ndarray], hear: Callable[[np.ndarray], float | None]
    ) -> None:
        world.progress.need_thread("averages beside the gradients need a thread of their own")
        self._world, self._speak, self._hear = world, speak, hear
        self._net = world.control.twin(0)
        self._tag = next(self._net.users) % self._net.tag_limit
        self._awake, self._due = False, 0.0
        self._asked = world.rank
        self._talk = self._beat()
        world.progress.serve(self._poll)

    @property
    def missing(self) -> list[int]:
        """The rank that this one waits for in a beat, if any."""
        return [] if self._asked == self._world.rank else [self._asked]

    def wake(self) -> None:
        """Take part in the next beat, as soon as all other ranks do."""
        if not self._awake:
            self._awake = True
            self._world.progress.call_services()

    def close(self) -> None:
        """No more beats; where all ranks sleep."""
        self._world.progress.dismiss(self._poll)

    def _poll(self) -> float:
        return next(self._talk)

    def _beat(self) -> Generator[float, None, None]:
        while True:
            while not self._awake:
                yield _ASLEEP
            while (pause := self._due - time.monotonic()) > 0:
                yield pause
            table = yield from self._gather(self._speak())
            # Asleep before others learn of it: who is told may wake this up at once.
            self._awake = False
            wanted = self._hear(table)
            if wanted is not None:
                self._awake, self._due = True, time.monotonic() + wanted
            yield 0.0

    def _gather(self, mine: np.ndarray) -> Generator[float, None, np.ndarray]:
        """All ranks' records, by Bruck's algorithm: all that are there go on, twice as far each time."""
        rank, size, net = self._world.rank, self._world.size, self._net
        rows, have = np.empty(size, mine.dtype), 1
        rows[:1] = mine
        while have < size:
            count = min(have, size - have)
            self._asked = (rank + have) % size
            requests: list[Any] = [
                net.irecv(rows[have : have + count], self._asked, self._tag),
                net.isend(rows[:count], (rank - have) % size, self._tag),
            ]
            while not all(request.Test() for request in requests):
                yield LISTENING
            have += count
        self._asked = rank
        return np.roll(rows, rank)
