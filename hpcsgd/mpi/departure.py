"""Departures: a rank leaves a world that is not closed, after an exception or because it was dropped; other
ranks that wait for it get an error, and the last departure frees the world."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcsgd.errors import HpcsgdError, RankLeft, format_ranks, rank_left
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.mpi.control_messages import ControlChannel
from hpcsgd.mpi.outstanding import MOST_SIGNATURES
from hpcsgd.mpi.waiting import DeadlineWaiter

if TYPE_CHECKING:
    from hpcsgd.mpi.node import Node

# Seconds that a wait for a rank that has left may last, since its last messages may be under way; and if the
# waiting rank has left too, and needs no result.
_GRACE, _GRACE_OF_LEFT = 2.0, 0.5
_SHORTEST, _LONGEST = 1e-3, 0.1  # seconds between two polls of a departure
_MOST_DEPARTURES = 8  # that may be unfinished when another world starts
_SETTLE = 2.0  # seconds for them then
_MOST_NEW = 8  # worlds between two searches for dropped ones in reference cycles

#: Of the worlds that are neither closed nor freed.
_present: weakref.WeakSet[Departure] = weakref.WeakSet()
#: Departures that have begun and not ended, in this order.
_unfinished: list[Departure] = []


@dataclass
class Part:
    """The communicators of a world or of a world split from it.

    Attributes
    ----------
    communicators
        Those with messages, by a name that is the same on their ranks, without their duplicates.
    to_free
        The MPI communicators that belong to hpcsgd, in the order of their creation.
    node
        The memory that the ranks of this node share; None: none yet.
    """

    communicators: dict[str, Communicator] = field(default_factory=dict)
    to_free: list[Any] = field(default_factory=list)
    node: Node | None = None


class Departure:
    """The departure of this rank from a world, and those of the other ranks.

    When all ranks have left, nobody waits for a message any more. Collectives that only some ranks have begun
    are then joined by the others, receives are cancelled, and messages that nobody has received are: a freed
    communicator's number is used again, and a late message would reach another world.

    Parameters
    ----------
    rank, size
        This rank, and the number of ranks.
    channel
        Messages to the other ranks.
    waiter
        The waits of this rank.
    parts
        The world, and all those split from it.
    release
        Called when the communicators are free.

    Attributes
    ----------
    reason
        Empty, or why this rank has left.
    has_thread
        Whether the communication thread advances the departure; else the next world does.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        channel: ControlChannel,
        waiter: DeadlineWaiter,
        parts: dict[int, Part],
        release: Callable[[], None],
    ) -> None:
        self._rank, self._channel, self._waiter, self._parts = rank, channel, waiter, parts
        self._others = set(range(size)) - {rank}
        self._release = release
        _present.add(self)
        self._interruption, self._interruptions = "", 0
        self._steps = self._leave()
        self._announce_at = 0.0
        self.reason = ""
        self.has_thread = False

    def begin(self, reason: str, delay: float = 0.0) -> None:
        """Record that this rank leaves; may be called anywhere, also by the garbage collector.

        Parameters
        ----------
        reason
            A clause for the errors of ranks that wait for this one: "was left after ValueError".
        delay
            Seconds until other ranks are notified.
        """
        self._announce_at = time.monotonic() + delay
        self.reason = reason
        _unfinished.append(self)

    def interrupt(self, reason: str) -> None:
        """Notify the other ranks that this one is interrupted; with an empty reason, that it goes on."""
        if reason == self._interruption:
            return
        self._interruption, self._interruptions = reason, self._interruptions + 1
        for rank in self._others:
            self._channel.interrupt(rank, reason)

    def receive_interruptions(self, gather: Callable[[int], list[int]]) -> None:
        """Receive all interruptions, for an unreceived message could reach another world; collective."""
        sent, received = gather(self._interruptions), self._channel.interruptions

        def complete() -> bool:
            self._channel.poll()
            return all(received[rank] == sent[rank] for rank in self._others)

        self._waiter.until(complete, "the last interruptions of other ranks")

    def check(self) -> None:
        """Raise in a thread that waits for a rank that has left, or is interrupted.

        Raises
        ------
        RankLeft
            That rank, and its reason.
        """
        if not self._channel.absent:
            return
        wait, now = self._waiter.waits_for(), time.monotonic()
        if wait is None:
            return
        started, ranks = wait
        grace = _GRACE_OF_LEFT if self.reason else _GRACE
        absent = list(self._channel.absent.items())
        late = [rank for rank, (_, since) in absent if now - max(since, started) > grace]
        awaited = [rank for rank in late if ranks is None or rank in ranks]
        if awaited:
            raise self._error(awaited)

    def _error(self, ranks: list[int]) -> RankLeft:
        reason = self._channel.absent[min(ranks)][0]
        return rank_left(f"this rank waits for {format_ranks(ranks)}, and the run {reason} there", self._rank)

    def error(self) -> HpcsgdError:
        """Return the error of operations of this rank after it has left."""
        return HpcsgdError(
            f"the run {self.reason}, and cannot go on", rank=self._rank, do="make a new hpcsgd.Run"
        )

    def advance(self) -> bool:
        """Do what can be done without waiting; returns whether the departure has ended.

        To be called when this rank's queue is empty. The communicators of a departure that fails stay.
        """
        try:
            next(self._steps)
            return False
        except StopIteration:
            pass
        except Exception as error:
            warnings.warn(f"a world that was left is not freed: {error}", RuntimeWarning, stacklevel=2)
        self.end()
        return True

    def run(self, stop: Callable[[], bool]) -> None:
        """Leave in the calling thread, until the departure ends or `stop()`."""
        pause = _SHORTEST
        while not self.advance() and not stop():
            time.sleep(pause)
            pause = min(pause * 1.2, _LONGEST)

    def end(self) -> None:
        """Forget this departure, or that there was none."""
        _present.discard(self)
        with contextlib.suppress(ValueError):
            _unfinished.remove(self)

    def _leave(self) -> Iterator[None]:
        """Yields while there is nothing to do."""
        yield from self._until(lambda: time.monotonic() >= self._announce_at)
        windows = [part.node.release_windows() for part in self._parts.values() if part.node is not None]
        for each in windows:
            next(each)
        communicators = self._communicators()
        counts = {key: each.outstanding.collectives for key, each in communicators.items()}
        for rank in self._others:
            self._channel.depart(rank, (self.reason, counts))
        yield from self._until(lambda: self._others <= set(self._channel.departures))
        for each in windows:
            next(each, None)
        everyone = {r: contents[0][1] for r, contents in self._channel.departures.items()}
        everyone[self._rank] = counts
        kept = yield from self._join_collectives(communicators, everyone)
        for communicator in communicators.values():
            if communicator not in kept:
                communicator.outstanding.cancel_receives()
                yield from self._until(communicator.outstanding.ended)
                yield from _receive_all(communicator.comm, communicator.tag_limit - 1)
        yield from _receive_all(self._channel.comm, 0)
        self._free([each.comm for each in kept])
        self._release()

    def _free(self, kept: list[Any]) -> None:
        for part in reversed(self._parts.values()):
            duplicates = [d.comm for c in part.communicators.values() for d in c.duplicates()]
            for comm in (*duplicates, *reversed(part.to_free)):
                if comm not in kept:
                    comm.Free()

    def _communicators(self) -> dict[tuple[int, str, int], Communicator]:
        """All communicators of this rank, by keys that are equal on their ranks."""
        return {
            (number, name, index): each
            for number, part in self._parts.items()
            for name, communicator in part.communicators.items()
            for index, each in enumerate((communicator, *communicator.duplicates()))
        }

    def _until(self, done: Callable[[], bool]) -> Iterator[None]:
        self._channel.poll()
        while not done():
            yield
            self._channel.poll()

    def _join_collectives(
        self, communicators: dict[Any, Communicator], everyone: dict[int, dict[Any, int]]
    ) -> Generator[None, None, list[Communicator]]:
        """Join what other ranks have begun; returns the communicators where that is not possible."""
        kept, expected = [], []
        for key, each in communicators.items():
            counts = [everyone[rank].get(key, -1) for rank in each.ranks]
            most = max(counts)
            if min(counts) < max(0, most - MOST_SIGNATURES):
                kept.append(each)
                continue
            ahead = each.ranks[counts.index(most)]
            for rank, count in zip(each.ranks, counts, strict=True):
                if count < most and ahead == self._rank:
                    self._channel.depart(rank, (key, each.outstanding.signatures(count)))
                elif count < most and rank == self._rank:
                    expected.append((ahead, key))
        for ahead, key in expected:
            yield from self._until(partial(self._has_sent, ahead, key))
            signatures = dict(self._channel.departures[ahead][1:])[key]
            communicators[key].outstanding.join(communicators[key].comm, signatures)
        return kept

    def _has_sent(self, rank: int, key: Any) -> bool:
        return key in dict(self._channel.departures[rank][1:])


def _receive_all(comm: Any, last_tag: int) -> Iterator[None]:
    """Receive every message that is under way; the ranks of the communicator send no more of their own.

    Messages from one rank arrive in order, so an empty one with a tag of its own is the last.
    """
    from mpi4py import MPI

    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sent = [comm.Isend(np.empty(0, np.uint8), rank, last_tag) for rank in others]
    received: list[Any] = []
    while others or sent or received:
        status = MPI.Status()
        message = comm.Improbe(tag=MPI.ANY_TAG, source=MPI.ANY_SOURCE, status=status)
        if message is None:
            sent = [request for request in sent if not request.Test()]
            received = [request for request in received if not request.Test()]
            yield
            continue
        nbytes = status.Get_count(MPI.BYTE)
        received.append(message.Irecv(np.empty(nbytes, np.uint8)))
        if nbytes == 0 and status.Get_tag() == last_tag:
            others.remove(status.Get_source())


class _Collection:
    """Searches for worlds in reference cycles, of which other ranks may have found more."""

    def __init__(self) -> None:
        self._next = _MOST_NEW

    def run_if_due(self) -> None:
        if len(_present) > self._next:
            gc.collect()
            self._next = len(_present) + _MOST_NEW


_collection = _Collection()


def settle() -> None:
    """Give the departures from earlier worlds time to end, where there are many of them."""
    _collection.run_if_due()
    deadline = time.monotonic() + _SETTLE
    while True:
        for each in list(_unfinished):
            if not each.has_thread:
                each.advance()
        if len(_unfinished) <= _MOST_DEPARTURES or time.monotonic() > deadline:
            return
        time.sleep(_SHORTEST)
