"""Asynchronous pairwise averaging: replicas of the models are averaged by the communication thread.

An active rank sends its replica a to a passive one, which replies with its own, b, and at once adds
(a - b) / 2 to it; on the reply the active one adds (b - a) / 2. So the sum of all replicas is invariant in
whatever order messages arrive, and since passive ranks never send requests, no cycle of waits can form. The
compute thread adds the correction of its replica to the model at the end of each step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hpcsgd.collectives.neighbour_exchange import message_buffers, split_by_bucket
from hpcsgd.collectives.staging import copy_to
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.tasks import POLL_INTERVAL, Steps, Task
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup
from hpcsgd.tensors.memory import pinned

_HEADER, _MODEL = 0, 1  # tags
_END_OF_STEPS, _MODEL_FOLLOWS, _END_OF_RUN = 0, 1, 2  # kinds of a header


class PairwiseAverager:
    """This rank's side of the pairwise averages; collective when made.

    A header, with the step counts that the sender has, precedes each model.

    Parameters
    ----------
    world
        The ranks.
    group
        The model of this rank.
    neighbours
        The ranks with which this one averages, all in the other half of the graph.
    active
        Whether this rank sends requests (True) or replies to them.
    seed
        Seed of the choice of neighbours.

    Attributes
    ----------
    counts
        int64 of shape (ranks,): the steps of each rank, as of the last header; those of this rank are exact.

    Raises
    ------
    HpcsgdError
        MPI provides less than MPI_THREAD_MULTIPLE.
    """

    def __init__(
        self, world: World, group: TensorGroup, neighbours: Sequence[int], *, active: bool, seed: int
    ) -> None:
        if neighbours and not world.progress.threaded:
            raise HpcsgdError(
                "AD-PSGD with schedule=free needs a communication thread",
                expected="MPI_THREAD_MULTIPLE",
                got="an MPI library that provides less",
                do="use an MPI library that provides MPI_THREAD_MULTIPLE, or --strategy "
                "adpsgd:schedule=drawn",
                everywhere=True,
            )
        self._world, self._group, self._neighbours, self._active = world, group, list(neighbours), active
        self._net = world.all.dup("AD-PSGD pairs")
        self._tag = 2 * self._net.next_id() % (self._net.tag_limit - 1)
        self._rng = np.random.default_rng([seed, world.rank])
        self.counts = np.zeros(world.size, np.int64)
        # The compute thread holds this for one pass over the model, never across a forward or backward.
        self._lock = threading.Lock()
        memory = [pinned(group.nbytes, world.device) for _ in range(4)]
        self._inbox, self._outbox = memory[:2]
        self._received, self._sent, self._replica, self._correction = (
            split_by_bucket(group, each) for each in memory
        )
        copy_to(group, self._replica)
        self._has_correction = False
        self._requesting = False  # a request is due or in flight
        self._dropped = self._end_is_sent = False
        self._requesters: deque[int] = deque()
        self._partner = world.rank
        self._to_notify: list[int] = []
        self._end_notices = dict.fromkeys(self._neighbours, 0)
        self._ends = 0
        self._headers_sent: list[tuple[Any, np.ndarray]] = []
        self._headers = {other: self._post_receive(other) for other in self._neighbours}
        self._services: list[Task] = []
        if self._neighbours:
            self._services.append(world.progress.serve(self._serve()))

    def total_steps(self) -> int:
        """Return the sum of `counts`."""
        return int(self.counts.sum())

    def step(self, update: Callable[[], None]) -> None:
        """Run the optimizer's update, add the correction to the model, and request an average."""
        update()
        with self._lock:
            self.counts[self._world.rank] += 1
            self._merge()
        if self._active and self._neighbours:
            self._requesting = True

    def finish(self) -> None:
        """Notify all neighbours that the requested steps are taken, and wait for the notice of each."""
        self._ends += 1
        self._to_notify = list(self._neighbours)

        def missing() -> list[int]:
            return [other for other, notices in self._end_notices.items() if notices < self._ends]

        self._world.progress.until(lambda: not missing(), "the end of steps of the neighbours", missing)

    def quiesce(self) -> None:
        """Wait until no average is in flight, and merge all corrections; collective."""
        self._until_idle()
        count = int(self.counts[self._world.rank])
        exact = self._world.gather(count, "the end of averages in pairs")
        self._until_idle()  # the last replies are sent
        with self._lock:
            np.maximum(self.counts, exact, out=self.counts)
            self._merge()

    def state_dict(self) -> dict[str, Any]:
        """Return `counts`."""
        return {"steps": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restart from the current models and the saved counts; collective, after `quiesce`."""
        with self._lock:
            copy_to(self._group, self._replica)
            self.counts[:] = state["steps"].numpy()
        self._world.gather(None, "a new start of averages in pairs")

    def close(self) -> None:
        """Stop to reply; collective, after `quiesce`."""
        for service in self._services:
            self._world.progress.stop_serving(service)
        self._world.gather(None, "the close of averages in pairs")
        for request, _ in self._headers.values():
            request.Cancel()
            request.Wait()

    def abandon(self) -> None:
        """Stop after the run was dropped or left: local; replies until the neighbours have dropped theirs.

        Called by the garbage collector too: takes no lock and calls no MPI.
        """
        self._dropped = True

    def _merge(self) -> None:
        if not self._neighbours:
            return
        if self._has_correction:
            for bucket, correction in zip(self._group, self._correction, strict=True):
                bucket.flat.add_(correction.to(bucket.flat.device, non_blocking=True))
        copy_to(self._group, self._replica)  # waits for all copies
        if self._has_correction:
            for correction in self._correction:
                correction.zero_()
            self._has_correction = False

    def _until_idle(self) -> None:
        self._world.progress.until(self._idle, "an average in pairs", lambda: [self._partner])

    def _idle(self) -> bool:
        return not (self._requesting or self._requesters or self._to_notify or self._headers_sent)

    # In the communication thread.

    def _serve(self) -> Steps[None]:
        protocol = self._request_averages() if self._active else self._reply_to_requests()
        while True:
            arrived = self._exchange_headers()
            if self._dropped and self._has_ended():
                return
            yield None if next(protocol) or arrived else POLL_INTERVAL

    def _exchange_headers(self) -> bool:
        """Receive headers and send those that are due; return whether any has arrived."""
        self._headers_sent = [entry for entry in self._headers_sent if not entry[0].Test()]
        arrived = [other for other, (request, _) in self._headers.items() if request.Test()]
        for other in arrived:
            self._on_header(other)
        while self._to_notify:
            self._send_header(self._to_notify[-1], _END_OF_STEPS)
            self._to_notify.pop()
        return bool(arrived)

    def _has_ended(self) -> bool:
        """Notify the neighbours of the end once no average is in flight; whether theirs have come too."""
        # An active neighbour may send requests until its end, and this rank's end comes after its replies.
        if not self._idle() or (self._headers and not self._active):
            return False
        if not self._end_is_sent:
            self._end_is_sent = True
            for other in self._neighbours:
                self._send_header(other, _END_OF_RUN)
            return False
        return not self._headers

    def _post_receive(self, other: int) -> tuple[Any, np.ndarray]:
        header = np.empty(self._world.size + 1, np.int64)
        return self._net.irecv(header, other, self._tag + _HEADER), header

    def _on_header(self, other: int) -> None:
        _, header = self._headers[other]
        with self._lock:
            np.maximum(self.counts, header[:-1], out=self.counts)
        if header[-1] == _END_OF_RUN:
            del self._headers[other]
            return
        self._headers[other] = self._post_receive(other)
        if header[-1] == _END_OF_STEPS:
            self._end_notices[other] += 1
        elif not self._active:
            self._requesters.append(other)

    def _send_header(self, other: int, kind: int) -> None:
        with self._lock:
            header = np.append(self.counts, kind)
        self._headers_sent.append((self._net.isend(header, other, self._tag + _HEADER), header))

    def _request_averages(self) -> Iterator[bool]:
        """Protocol of an active rank; each `next` makes progress, and yields whether there was any."""
        while True:
            while not self._requesting:
                yield False
            self._partner = int(self._rng.choice(self._neighbours))
            self._take_snapshot()
            yield from _until_complete([*self._send(), *self._receive()])
            self._average()
            self._requesting = False
            yield True

    def _reply_to_requests(self) -> Iterator[bool]:
        """Protocol of a passive rank; each `next` makes progress, and yields whether there was any."""
        while True:
            while not self._requesters:
                yield False
            self._partner = self._requesters[0]
            yield from _until_complete(self._receive())
            self._take_snapshot()
            self._average()
            yield from _until_complete(self._send())
            self._requesters.popleft()
            yield True

    def _take_snapshot(self) -> None:
        with self._lock:
            for sent, replica in zip(self._sent, self._replica, strict=True):
                sent.copy_(replica)

    def _average(self) -> None:
        """Add half the difference between the received replica and the sent one."""
        for received, sent in zip(self._received, self._sent, strict=True):
            received.sub_(sent).mul_(0.5)
        with self._lock:
            parts = zip(self._received, self._replica, self._correction, strict=True)
            for received, replica, correction in parts:
                replica.add_(received)
                correction.add_(received)
            self._has_correction = True

    def _send(self) -> list[Any]:
        self._send_header(self._partner, _MODEL_FOLLOWS)
        return [
            self._net.isend(piece, self._partner, self._tag + _MODEL)
            for piece in message_buffers(self._outbox)
        ]

    def _receive(self) -> list[Any]:
        return [
            self._net.irecv(piece, self._partner, self._tag + _MODEL)
            for piece in message_buffers(self._inbox)
        ]


def _until_complete(requests: Sequence[Any]) -> Iterator[bool]:
    while not all(request.Test() for request in requests):
        yield False
