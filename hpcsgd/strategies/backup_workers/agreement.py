"""Agreement of all ranks on the participants of an iteration: by shared memory, or by small messages.

Both ways use an `IterationCloser`. On one node all ranks share its memory, under a lock; between nodes rank 0
owns it and replies to requests in its communication thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from hpcsgd.mpi.node import NATIVE_WAIT_SLICE
from hpcsgd.mpi.tasks import POLL_INTERVAL, Steps, Wait
from hpcsgd.mpi.world import World
from hpcsgd.strategies.backup_workers.closing_rule import IterationCloser, words_needed

Edges = Sequence[tuple[int, int]]
#: Name of the wait in errors.
CLOSE_OF_ITERATION = "the close of an iteration of backup workers"
_LEFT = -1  # in place of the end of a loop, in the last request of a rank that has dropped the run
_LOOK_INTERVAL = 0.1  # seconds between two looks whether this rank has


class Agreement(Protocol):
    """Agreement in which each rank is one peer."""

    def join(self, end: int) -> Steps[tuple[int, list[int]] | None]:
        """Mark this rank as done and wait until the iteration closes; in the task `CLOSE_OF_ITERATION`.

        Returns
        -------
        (iteration, participants) or None
            None if all iterations before `end`, which is equal on all ranks, are closed.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the iterations, after `end` has been reached."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned; on all ranks, between two barriers."""

    def close(self) -> None:
        """Finish all communication; collective."""

    def abandon(self) -> None:
        """Stop after the run was dropped or left; local: without locks and MPI, for the garbage collector."""


def make_agreement(world: World, edges: Edges, backups: int | None) -> Agreement:
    """Return the agreement of all ranks, by shared memory if all are on one node; collective."""
    from hpcsgd.kernels.sync import ticket_lock

    head = ticket_lock.LOCK_WORDS + ticket_lock.COUNT_WORDS
    size = head + words_needed(world.size, edges)
    memory = None
    if world.size == 1:
        memory = np.zeros(size, np.int32)
    elif world.local_size == world.size and (window := world.local.allocate(4 * size)) is not None:
        memory = window.rows[0].view(np.int32)
    if memory is None:
        return MessageAgreement(world, edges, backups)
    closer = IterationCloser(world.size, edges, backups, memory[head:])
    return SharedMemoryAgreement(world, memory[:head], closer)


class SharedMemoryAgreement:
    """Agreement on one node: an `IterationCloser` in shared memory, a lock, and a count of closed iterations.

    Parameters
    ----------
    world
        The ranks.
    words
        int32, shared, zero at first: a lock, then a count, see `hpcsgd.kernels.sync.ticket_lock`.
    closer
        In shared memory.
    """

    def __init__(self, world: World, words: np.ndarray, closer: IterationCloser) -> None:
        from hpcsgd.kernels.sync import ticket_lock

        self._world, self._words, self._closer, self._kernel = world, words, closer, ticket_lock
        self._count = ticket_lock.LOCK_WORDS
        closer.open()
        world.gather(None, "the start of an agreement")

    def join(self, end: int) -> Steps[tuple[int, list[int]] | None]:
        world, words, closer, kernel = self._world, self._words, self._closer, self._kernel
        ticket = kernel.take_ticket(words, 0)
        yield self._wait(lambda micros: kernel.acquire(words, 0, ticket, world.local.spins, micros))
        entered = closer.mark_done([world.rank], end)
        if entered is not None and closer.iteration > entered:
            kernel.set_count(words, self._count, closer.iteration)
        kernel.release(words, 0, ticket)
        if entered is None:
            return None
        yield self._wait(
            lambda micros: kernel.wait_for_count(words, self._count, entered + 1, world.local.spins, micros)
        )
        return entered, closer.participants(world.rank)

    def _wait(self, done: Callable[[int], bool]) -> Wait:
        return Wait(lambda: bool(done(NATIVE_WAIT_SLICE)), lambda: self._closer.awaited)

    def state_dict(self) -> dict[str, Any]:
        return self._closer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # All ranks write the same values.
        self._closer.load_state_dict(state)
        self._words[self._count] = self._closer.iteration

    def close(self) -> None:
        """Do nothing: a rank that is late accesses shared memory only, and waits for no other."""

    abandon = close


class MessageAgreement:
    """Agreement by requests to rank 0, which replies when the iteration closes.

    The messages are control traffic and not counted.

    Parameters
    ----------
    world
        The ranks.
    edges, backups
        Parameters of the `IterationCloser`, which rank 0 owns.
    """

    def __init__(self, world: World, edges: Edges, backups: int | None) -> None:
        self._world, self._net = world, world.all.dup("iterations of backup workers")
        # Two runs in one world share the communicator: each has tags of its own.
        number = self._net.next_id()
        self._request_tag, self._reply_tag = (
            (2 * number + kind) % (self._net.tag_limit - 1) for kind in (0, 1)
        )
        #: On rank 0: a posted receive and its buffer for each rank. Not one receive from any source: MPICH
        #: 5.0 has lost messages to such a receive if one of them was from the rank itself.
        self._requests: list[tuple[Any, np.ndarray]] = []
        self._reply = np.zeros(2 + world.size + len(edges), np.int32)
        self._replies: list[tuple[Any, np.ndarray]] = []
        self._abandoned = False
        #: The closer of rank 0, and on every rank a copy of its state as of the last reply.
        self._closer, self._mirror = (IterationCloser(world.size, edges, backups) for _ in range(2))
        if world.rank == 0:
            self._requests = [self._post_receive(rank) for rank in range(world.size)]
        #: On rank 0: the ranks that have dropped the run, and wait for no reply any more.
        self._left: set[int] = set()
        steps = self._serve_requests() if world.rank == 0 else self._leave_once_abandoned()
        self._service = world.progress.serve(steps)

    def join(self, end: int) -> Steps[tuple[int, list[int]] | None]:
        net = self._net
        reply = net.irecv(self._reply, 0, self._reply_tag)
        request = np.array([end], np.int32)
        yield net.completion(net.comm.Isend(request, 0, self._request_tag), 0)
        yield net.completion(reply, 0)
        (entered, iteration), participants, unused = np.split(self._reply, [2, 2 + self._world.size])
        self._mirror.open(int(iteration), np.flatnonzero(unused).tolist())
        return None if entered < 0 else (int(entered), np.flatnonzero(participants).tolist())

    def _post_receive(self, rank: int) -> tuple[Any, np.ndarray]:
        request = np.zeros(1, np.int32)
        return self._net.irecv(request, rank, self._request_tag), request

    def _leave_once_abandoned(self) -> Steps[None]:
        """Send rank 0 that this rank has dropped the run."""
        while not self._abandoned:
            yield _LOOK_INTERVAL
        end = np.array([_LEFT], np.int32)
        yield self._net.completion(self._net.comm.Isend(end, 0, self._request_tag))

    def _serve_requests(self) -> Steps[None]:
        while not self._abandoned or len(self._left) < self._world.size - 1 or self._replies:
            yield None if self._reply_to_requests() else POLL_INTERVAL
        self._cancel_requests()

    def _reply_to_requests(self) -> bool:
        """Handle the requests that have arrived; return whether there were any."""
        busy = False
        for rank, (received, request) in enumerate(self._requests):
            if rank in self._left or not received.Test():
                continue
            busy = True
            if request[0] == _LEFT:
                self._left.add(rank)
                continue
            self._requests[rank] = self._post_receive(rank)
            entered = self._closer.mark_done([rank], int(request[0]))
            if entered is None:
                self._send_reply(-1, [rank])
            elif self._closer.iteration > entered:
                self._send_reply(entered, self._closer.participants(rank))
        if self._replies:
            self._replies = [entry for entry in self._replies if not entry[0].Test()]
        return busy

    def _send_reply(self, entered: int, participants: Sequence[int]) -> None:
        reply = np.zeros_like(self._reply)
        reply[:2] = entered, self._closer.iteration
        reply[2 : 2 + self._world.size][participants] = 1
        reply[2 + self._world.size :][self._closer.unused_edges] = 1
        for rank in participants:
            self._replies.append((self._net.comm.Isend(reply, rank, self._reply_tag), reply))

    def state_dict(self) -> dict[str, Any]:
        return self._mirror.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._closer.load_state_dict(state)
        self._mirror.load_state_dict(state)

    def close(self) -> None:
        # Rank 0 may close before the last rank has sent its last request.
        self._world.gather(None, "the end of an agreement")
        self._world.progress.stop_serving(self._service)
        if self._world.rank == 0:
            for sent, _ in self._replies:
                self._net.wait(sent, CLOSE_OF_ITERATION)
            self._cancel_requests()

    def abandon(self) -> None:
        self._abandoned = True

    def _cancel_requests(self) -> None:
        for rank, (received, _) in enumerate(self._requests):
            if rank not in self._left:
                received.Cancel()
                received.Wait()
        self._requests = []
