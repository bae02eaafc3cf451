"""Links inside one MPI job: between a server and a client that are ranks of it."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.mpi.communicator import Transport
from hpcsgd.server.protocol import HEAD_BYTES, LAST_WORDS, Head, Link, Party

_HEAD, _BODY = 0, 1  # tags
_AHEAD = 2  # messages of one link that arrive at a time


class MPILink(Link):
    """A link inside one MPI job.

    Parameters
    ----------
    transport
        A communicator for links alone; there is one between any two of its ranks.
    peer
        The other side's rank there.
    party, name, traffic
        See `Link`.
    """

    lasting = True

    def __init__(
        self, transport: Transport, peer: int, party: Party, name: str, traffic: Traffic | None = None
    ) -> None:
        super().__init__(party, name, traffic)
        self._transport, self._peer = transport, peer
        self._leaving: deque[tuple[Any, object]] = deque()
        self._buffer = np.empty(HEAD_BYTES, np.uint8)
        self._coming: Any = None  # the next head
        self._bodies: deque[tuple[Head, np.ndarray, Any]] = deque()
        self._closed = False

    def _queue(self, head: Head, body: np.ndarray | None) -> None:
        packed = np.frombuffer(head.pack(), np.uint8)
        self._leaving.append((self._transport.isend(packed, self._peer, _HEAD), packed))
        if body is not None:
            self._leaving.append((self._transport.isend(body, self._peer, _BODY), body))

    def pump(self) -> bool:
        moved = False
        while self._leaving and self._leaving[0][0].Test():
            self._leaving.popleft()
            moved = True
        # Bodies are asked for before they are due: else the word for the next one would wait behind what
        # this side sends meanwhile, and the two directions would take turns.
        while self._listens() and self._coming.Test():
            self._coming = None
            head, body = self._expect(self._buffer.data)
            request = self._transport.irecv(body, self._peer, _BODY) if body.size else None
            self._bodies.append((head, body, request))
            moved = True
        while self._bodies and (self._bodies[0][2] is None or self._bodies[0][2].Test()):
            head, body, _ = self._bodies.popleft()
            self._hand_over(head, body)
            moved = True
        return moved

    def _listens(self) -> bool:
        """Whether a head is awaited."""
        last = bool(self._bodies) and self._bodies[-1][0].kind in LAST_WORDS
        if self._coming is None and not self._closed and not last and len(self._bodies) < _AHEAD:
            self._coming = self._transport.irecv(self._buffer, self._peer, _HEAD)
        return self._coming is not None

    @property
    def idle(self) -> bool:
        return not self._leaving

    def close(self) -> None:
        # Who closes has heard the last word, so that no receive is posted any more.
        self._closed = True
