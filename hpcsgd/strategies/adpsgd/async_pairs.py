"""Averaging in pairs that nobody waits for: on replicas of the models, by whichever thread has time.

An active rank sends its replica a to a passive one, which answers with its own, b, and at once adds
(a - b) / 2 to it; on the answer the active one adds (b - a) / 2. So the sum of all replicas stays the same
in whatever order things happen, and since passive ranks never ask, no cycle of waits can form. What the
replica has gained goes into the model when the compute thread says so, at the end of a step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hpcsgd.collectives.neighbour_exchange import parts_of, pieces
from hpcsgd.collectives.staging import to_host
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.progress import LISTENING
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup

_TWIN = 8
_WORD, _MODEL = 0, 1  # tags: step counts and what follows them; a model
_NEWS, _MODEL_FOLLOWS = 0, 1


class Pairwise:
    """This rank's part in averaging by pairs; collective when made.

    A word, the step counts that a rank knows of, goes before each model.

    Parameters
    ----------
    world
        The ranks.
    group
        The model, in whose place a replica is averaged.
    neighbours
        The ranks with which this one averages, all of them on the other side.
    active
        Whether this rank asks, or answers.
    seed
        Of the draws of whom to ask.

    Attributes
    ----------
    counts
        The steps that each rank has taken, as far as this one knows; its own exactly.

    Raises
    ------
    HpcsgdError
        Without MPI_THREAD_MULTIPLE.
    """

    def __init__(
        self, world: World, group: TensorGroup, neighbours: Sequence[int], *, active: bool, seed: int
    ) -> None:
        if neighbours and not world.progress.threaded:
            raise HpcsgdError(
                "averages beside the gradients need a thread of their own",
                expected="MPI_THREAD_MULTIPLE",
                got="an MPI that gives less",
                do="use an MPI that gives it, or a method that keeps step, as adpsgd:schedule=drawn",
                everywhere=True,
            )
        self._world, self._group, self._neighbours, self._active = world, group, list(neighbours), active
        self._net = world.all.twin(_TWIN)
        self._tag = 2 * next(self._net.users) % (self._net.tag_limit - 1)
        self._rng = np.random.default_rng([seed, world.rank])
        self.counts = np.zeros(world.size, np.int64)
        # The compute thread takes this for one pass over the model, never across a forward or backward.
        self._lock = threading.Lock()
        memory = [torch.zeros(group.nbytes, dtype=torch.uint8) for _ in range(4)]
        self._inbox, self._outbox = memory[:2]
        self._received, self._shown, self._replica, self._gain = (parts_of(group, each) for each in memory)
        to_host(group, self._replica)
        self._gained = False
        self._asking = False  # a request is wanted or under way
        self._askers: deque[int] = deque()
        self._partner = world.rank
        self._untold: list[int] = []
        self._news = dict.fromkeys(self._neighbours, 0)
        self._rounds = 0
        self._words_sent: list[tuple[Any, np.ndarray]] = []
        self._words = {other: self._listen(other) for other in self._neighbours}
        self._talk = self._ask() if active else self._answer()
        if self._neighbours:
            world.progress.serve(self._poll)

    @property
    def steps(self) -> int:
        """The steps of all ranks that this one knows of."""
        return int(self.counts.sum())

    def boundary(self) -> None:
        """Count a step that was just taken, bring model and replica together, and want an average."""
        with self._lock:
            self.counts[self._world.rank] += 1
            self._merge()
        if self._active and self._neighbours:
            self._asking = True

    def finish(self) -> None:
        """Let all know that the steps are taken: tell the neighbours once, and hear it from each."""
        self._rounds += 1
        self._untold = list(self._neighbours)

        def silent() -> list[int]:
            return [other for other, heard in self._news.items() if heard < self._rounds]

        self._world.progress.until(lambda: not silent(), "the end of steps of the neighbours", silent)

    def settle(self) -> None:
        """Come to rest: nothing is under way, and each model has all that it gained; collective."""
        self._until_idle()
        own = int(self.counts[self._world.rank])
        exact = self._world.gather(own, "the rest between averages in pairs")
        self._until_idle()  # the last answers have left
        with self._lock:
            np.maximum(self.counts, exact, out=self.counts)
            self._merge()

    def reset(self, counts: Iterable[int]) -> None:
        """Begin again from the models that are in place now; collective, at rest."""
        with self._lock:
            to_host(self._group, self._replica)
            self.counts[:] = list(counts)
        self._world.gather(None, "a new start of averages in pairs")

    def close(self) -> None:
        """Stop to answer; collective."""
        self.settle()
        self._world.progress.dismiss(self._poll)
        self._world.gather(None, "the end of averages in pairs")
        for request, _ in self._words.values():
            request.Cancel()
            request.Wait()

    def _merge(self) -> None:
        if not self._neighbours:
            return
        if self._gained:
            for bucket, gain in zip(self._group, self._gain, strict=True):
                bucket.flat.add_(gain.to(bucket.flat.device))
                gain.zero_()
            self._gained = False
        to_host(self._group, self._replica)

    def _until_idle(self) -> None:
        self._world.progress.until(self._idle, "an average in pairs", lambda: [self._partner])

    def _idle(self) -> bool:
        return not (self._asking or self._askers or self._untold or self._words_sent)

    def _poll(self) -> float:
        """The service: hear words, go on with the pair under way."""
        self._words_sent = [(request, word) for request, word in self._words_sent if not request.Test()]
        heard = [other for other, (request, _) in self._words.items() if request.Test()]
        for other in heard:
            self._hear(other)
        while self._untold:
            self._tell(self._untold[-1], _NEWS)
            self._untold.pop()
        return 0.0 if next(self._talk) or heard else LISTENING

    def _listen(self, other: int) -> tuple[Any, np.ndarray]:
        word = np.empty(self._world.size + 1, np.int64)
        return self._net.irecv(word, other, self._tag + _WORD), word

    def _hear(self, other: int) -> None:
        _, word = self._words[other]
        with self._lock:
            np.maximum(self.counts, word[:-1], out=self.counts)
        self._words[other] = self._listen(other)
        if word[-1] == _NEWS:
            self._news[other] += 1
        elif not self._active:
            self._askers.append(other)

    def _tell(self, other: int, kind: int) -> None:
        with self._lock:
            word = np.append(self.counts, kind)
        self._words_sent.append((self._net.isend(word, other, self._tag + _WORD), word))

    def _ask(self) -> Iterator[bool]:
        while True:
            while not self._asking:
                yield False
            self._partner = int(self._rng.choice(self._neighbours))
            self._show()
            yield from _all([*self._send(), *self._receive()])
            self._gain_half()
            self._asking = False
            yield True

    def _answer(self) -> Iterator[bool]:
        while True:
            while not self._askers:
                yield False
            self._partner = self._askers[0]
            yield from _all(self._receive())
            self._show()
            self._gain_half()
            yield from _all(self._send())
            self._askers.popleft()
            yield True

    def _show(self) -> None:
        with self._lock:
            for shown, replica in zip(self._shown, self._replica, strict=True):
                shown.copy_(replica)

    def _gain_half(self) -> None:
        """Go half the way from what was shown to what was received."""
        for received, shown in zip(self._received, self._shown, strict=True):
            received.sub_(shown).mul_(0.5)
        with self._lock:
            for received, replica, gain in zip(self._received, self._replica, self._gain, strict=True):
                replica.add_(received)
                gain.add_(received)
            self._gained = True

    def _send(self) -> list[Any]:
        self._tell(self._partner, _MODEL_FOLLOWS)
        return [self._net.isend(piece, self._partner, self._tag + _MODEL) for piece in pieces(self._outbox)]

    def _receive(self) -> list[Any]:
        return [self._net.irecv(piece, self._partner, self._tag + _MODEL) for piece in pieces(self._inbox)]


def _all(requests: Sequence[Any]) -> Iterator[bool]:
    """Yield until all requests are complete."""
    while not all(request.Test() for request in requests):
        yield False
