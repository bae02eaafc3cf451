"""Ranks agree on who takes part in an iteration: by atomics in shared memory, or by small messages.

Either way `Rounds` decides. On one node all ranks use the same ones, one at a time; between nodes rank 0
keeps them as a service of its communication thread, which orders and answers, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from hpcsgd.mpi.progress import LISTENING
from hpcsgd.mpi.world import SLICE_OF_WAIT, World
from hpcsgd.strategies.backup_workers.closing_rule import Rounds, words

Edges = Sequence[tuple[int, int]]
_TWIN = 9  # of the world's communicators, for these messages alone
#: What is waited for, in errors.
WHAT = "the close of an iteration, with all that are done by then"


class Agreement(Protocol):
    """Where each rank is one peer."""

    def join(self, end: int) -> tuple[int, list[int]] | None:
        """Say that this rank is done, and wait: which iteration that was, and who took part in it.

        None where all iterations before `end`, which is the same on all ranks, are closed.
        """

    def state_dict(self) -> dict[str, Any]:
        """That of the rounds, once `end` is reached."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; on all ranks, between two barriers."""

    def close(self) -> None:
        """Leave nothing in flight; collective."""


def agreement(world: World, edges: Edges, backups: int | None) -> Agreement:
    """The agreement of all ranks, one peer each; collective."""
    from hpcsgd.kernels.sync import ticket_lock

    head = ticket_lock.LOCK_WORDS + ticket_lock.COUNT_WORDS
    size = head + words(world.size, edges)
    memory = None
    if world.size == 1:
        memory = np.zeros(size, np.int32)
    elif world.local_size == world.size and (window := world.window(4 * size)) is not None:
        memory = window.rows[0].view(np.int32)
    if memory is None:
        return ByMessages(world, edges, backups)
    return InMemory(world, memory[:head], Rounds(world.size, edges, backups, memory[head:]))


class InMemory:
    """Where all ranks share memory: a lock around the rounds, and the count of those closed, to sleep on.

    Parameters
    ----------
    world
        The ranks.
    words
        A lock, then a count, see `hpcsgd.kernels.sync.ticket_lock`; shared, zero at first.
    rounds
        In shared memory.
    """

    def __init__(self, world: World, words: np.ndarray, rounds: Rounds) -> None:
        from hpcsgd.kernels.sync import ticket_lock

        self._world, self._words, self._rounds, self._kernel = world, words, rounds, ticket_lock
        self._closed = ticket_lock.LOCK_WORDS
        rounds.begin()
        world.gather(None, "the start of an agreement")

    def join(self, end: int) -> tuple[int, list[int]] | None:
        world, words, rounds, kernel = self._world, self._words, self._rounds, self._kernel
        ticket = kernel.draw(words, 0)
        self._until(lambda micros: kernel.mine(words, 0, ticket, world.spins, micros))
        entered = rounds.announce([world.rank], end)
        if entered is not None and rounds.iteration > entered:
            kernel.advance(words, self._closed, rounds.iteration)
        kernel.leave(words, 0, ticket)
        if entered is None:
            return None
        self._until(lambda micros: kernel.reached(words, self._closed, entered + 1, world.spins, micros))
        return entered, rounds.members(world.rank)

    def _until(self, done: Callable[[int], bool]) -> None:
        waiter, rounds = self._world.waiter, self._rounds
        waiter.until(lambda: bool(done(SLICE_OF_WAIT)), WHAT, lambda: rounds.awaited)

    def state_dict(self) -> dict[str, Any]:
        return self._rounds.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # All ranks write the same.
        self._rounds.load_state_dict(state)
        self._words[self._closed] = self._rounds.iteration

    def close(self) -> None:
        """A rank that is late meets nobody in the memory it shares: there is nothing to finish."""


class ByMessages:
    """Every rank asks rank 0, which answers when the iteration closes.

    These messages are not counted, as all else that ranks tell each other about steps.

    Parameters
    ----------
    world
        The ranks.
    edges, backups
        As for `Rounds`, which rank 0 keeps.
    """

    def __init__(self, world: World, edges: Edges, backups: int | None) -> None:
        self._world, self._net = world, world.all.twin(_TWIN)
        # Messages of two runs in one world must not be taken for each other's.
        number = next(self._net.users)
        self._question_tag, self._answer_tag = (
            (2 * number + kind) % (self._net.tag_limit - 1) for kind in (0, 1)
        )
        #: On rank 0: what each rank asks next, and where that arrives. One for each, for MPICH 5.0 has lost
        #: messages to a receive from any source where one of them was the rank's own.
        self._questions: list[tuple[Any, np.ndarray]] = []
        self._answer = np.zeros(2 + world.size + len(edges), np.int32)
        self._answers: list[tuple[Any, np.ndarray]] = []
        #: Those that decide, on rank 0, and what this rank was last told of them.
        self._rounds, self._mirror = (Rounds(world.size, edges, backups) for _ in range(2))
        if world.rank == 0:
            self._questions = [self._listen(rank) for rank in range(world.size)]
            world.progress.serve(self._serve)

    def join(self, end: int) -> tuple[int, list[int]] | None:
        net = self._net
        answer = net.comm.Irecv(self._answer, 0, self._answer_tag)
        question = np.array([end], np.int32)
        net.wait(net.comm.Isend(question, 0, self._question_tag), WHAT, 0)
        net.wait(answer, WHAT, 0)
        (entered, iteration), members, unused = np.split(self._answer, [2, 2 + self._world.size])
        self._mirror.begin(int(iteration), np.flatnonzero(unused).tolist())
        return None if entered < 0 else (int(entered), np.flatnonzero(members).tolist())

    def _listen(self, rank: int) -> tuple[Any, np.ndarray]:
        question = np.zeros(1, np.int32)
        return self._net.comm.Irecv(question, rank, self._question_tag), question

    def _serve(self) -> float:
        """Answer whoever can be answered."""
        busy = False
        for rank, (request, question) in enumerate(self._questions):
            if not request.Test():
                continue
            busy, self._questions[rank] = True, self._listen(rank)
            entered = self._rounds.announce([rank], int(question[0]))
            if entered is None:
                self._tell(-1, [rank])
            elif self._rounds.iteration > entered:
                self._tell(entered, self._rounds.members(rank))
        if self._answers:
            self._answers = [entry for entry in self._answers if not entry[0].Test()]
        return 0.0 if busy else LISTENING

    def _tell(self, entered: int, members: Sequence[int]) -> None:
        answer = np.zeros_like(self._answer)
        answer[:2] = entered, self._rounds.iteration
        answer[2 : 2 + self._world.size][members] = 1
        answer[2 + self._world.size :][self._rounds.unused] = 1
        for member in members:
            self._answers.append((self._net.comm.Isend(answer, member, self._answer_tag), answer))

    def state_dict(self) -> dict[str, Any]:
        return self._mirror.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rounds.load_state_dict(state)
        self._mirror.load_state_dict(state)

    def close(self) -> None:
        # Rank 0 may be through before the last one has asked.
        self._world.gather(None, "the end of an agreement")
        if self._world.rank == 0:
            self._world.progress.dismiss(self._serve)
            for request, _ in self._answers:
                self._net.wait(request, WHAT)
            for request, _ in self._questions:
                request.Cancel()
                self._net.wait(request, WHAT)
