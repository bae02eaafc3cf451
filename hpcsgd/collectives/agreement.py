"""Ranks agree on who takes part in an iteration: by atomics in shared memory, or by small messages.

Either way `Rounds` decides. On one node all ranks use the same ones, one at a time; between nodes rank 0
keeps them as a service of its communication thread, which orders and answers, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from hpcsgd.collectives.rounds import Rounds, words
from hpcsgd.world import SLICE_OF_WAIT, World

Edges = Sequence[tuple[int, int]]
_NOBODY: list[int] = []


class Agreement(Protocol):
    """Where each rank is one peer."""

    def join(self, end: int) -> tuple[int, list[int]] | None:
        """Say that this rank is done, and wait: which iteration that was, and who took part in it.

        None where all iterations before `end`, which is the same on all ranks, are closed.
        """

    def unused(self) -> list[int]:
        """The numbers of the edges still to use, once `end` is reached."""

    def restart(self, iteration: int, unused: Sequence[int]) -> None:
        """Open an iteration; on all ranks, which are between two barriers."""

    def close(self) -> None:
        """Leave nothing in flight; collective."""


def agreement(world: World, edges: Edges, backups: int | None) -> Agreement:
    """The agreement of all ranks, one peer each; collective."""
    from hpcsgd.kernels import counter

    head = counter.LOCK_WORDS + counter.COUNT_WORDS
    size = head + words(world.size, edges)
    memory = None
    if world.size == 1:
        memory = np.zeros(size, np.int32)
    elif world.local_size == world.size and (window := world.window(4 * size)) is not None:
        memory = window.rows[0].view(np.int32)
    if memory is None:
        return ByMessages(world, Rounds(world.size, edges, backups), len(edges))
    return InMemory(world, memory[:head], Rounds(world.size, edges, backups, memory[head:]))


class InMemory:
    """Where all ranks share memory: a lock around the rounds, and the count of those closed, to sleep on.

    Parameters
    ----------
    world
        The ranks.
    words
        A lock, then a count, see `hpcsgd.kernels.counter`; shared, zero at first.
    rounds
        In shared memory.
    """

    def __init__(self, world: World, words: np.ndarray, rounds: Rounds) -> None:
        from hpcsgd.kernels import counter

        self._world, self._words, self._rounds, self._kernel = world, words, rounds, counter
        self._closed = counter.LOCK_WORDS
        self.restart(0, _NOBODY)
        world.gather(None, "the start of an agreement")

    def join(self, end: int) -> tuple[int, list[int]] | None:
        words, rounds, kernel = self._words, self._rounds, self._kernel
        ticket = kernel.draw(words, 0)
        self._until(lambda micros: kernel.mine(words, 0, ticket, self._world.spins, micros))
        entered = rounds.announce([self._world.rank], end)
        if entered is not None and rounds.iteration > entered:
            kernel.advance(words, self._closed, rounds.iteration)
        kernel.leave(words, 0, ticket)
        if entered is None:
            return None
        self._until(
            lambda micros: kernel.reached(words, self._closed, entered + 1, self._world.spins, micros)
        )
        return entered, rounds.members(self._world.rank)

    def _until(self, done: Callable[[int], bool]) -> None:
        rounds = self._rounds
        self._world.waiter.until(lambda: bool(done(SLICE_OF_WAIT)), _what(rounds), lambda: rounds.awaited)

    def unused(self) -> list[int]:
        return self._rounds.unused

    def restart(self, iteration: int, unused: Sequence[int]) -> None:
        # All ranks write the same.
        self._rounds.begin(iteration, unused)
        self._words[self._closed] = iteration

    def close(self) -> None:
        """Nothing is in flight: a rank that is late meets nobody in the memory it shares."""


class ByMessages:
    """Every rank asks rank 0, which answers when the iteration closes.

    These messages are not counted, as all else that ranks tell each other about steps.

    Parameters
    ----------
    world
        The ranks.
    rounds
        Those of rank 0 decide.
    edges
        How many there are.
    """

    _made = 0

    def __init__(self, world: World, rounds: Rounds, edges: int) -> None:
        self._world, self._rounds = world, rounds
        self._net = world.all.twin(8)
        # Messages of two runs in one world must not be taken for each other's.
        ByMessages._made = number = 1 + max(world.gather(ByMessages._made, "the start of an agreement"))
        self._question_tag, self._answer_tag = (2 * number + i for i in range(2))
        self._question = np.zeros(2, np.int32)
        self._answers: list[tuple[Any, np.ndarray]] = []
        self._members, self._unused = world.size, edges
        self.restart(0, _NOBODY)
        if world.rank == 0:
            self._incoming = self._receive()
            world.progress.serve(self._serve)

    def join(self, end: int) -> tuple[int, list[int]] | None:
        net, what = self._net, _what(self._rounds)
        question = np.array([self._world.rank, end], np.int32)
        answer = np.zeros(1 + self._world.size + self._edges, np.int32)
        arriving = net.comm.Irecv(answer, 0, self._answer_tag)
        net.wait(net.comm.Isend(question, 0, self._question_tag), what, 0)
        net.wait(arriving, what)
        entered, members, unused = np.split(answer, [1, 1 + self._world.size])
        ...
