"""Links between a server and a client that are ranks of the same MPI job."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.server.protocol import FINAL_TYPES, HEADER_BYTES, Handler, Header, Link

_MAX_RECEIVES = 2  # messages of one link that are received at the same time


class MPILink(Link):
    """Link between two ranks of one MPI job, on a communicator that is used by links alone.

    `number` distinguishes the links of the two ranks, one a run, from 0; it is equal on both.
    """

    permanent = True

    def __init__(
        self,
        communicator: Communicator,
        peer: int,
        number: int,
        handler: Handler,
        name: str,
        traffic: Traffic | None = None,
    ) -> None:
        super().__init__(handler, name, traffic)
        self._communicator, self._peer = communicator, peer
        self._header_tag, self._body_tag = (
            (2 * number + kind) % (communicator.tag_limit - 1) for kind in (0, 1)
        )
        self._outgoing: deque[tuple[Any, object]] = deque()
        self._header_buffer = np.empty(HEADER_BYTES, np.uint8)
        self._header_request: Any = None
        self._incoming: deque[tuple[Header, np.ndarray, Any]] = deque()
        self._closed = False

    def _queue(self, header: Header, body: np.ndarray | None) -> None:
        packed = np.frombuffer(header.pack(), np.uint8)
        self._outgoing.append((self._communicator.isend(packed, self._peer, self._header_tag), packed))
        if body is not None:
            self._outgoing.append((self._communicator.isend(body, self._peer, self._body_tag), body))

    def pump(self) -> bool:
        moved = False
        while self._outgoing and self._outgoing[0][0].Test():
            self._outgoing.popleft()
            moved = True
        # The receive of a body is posted before the previous body is complete: else the rendezvous of the
        # next one would wait behind the sends of this side, and the two directions would alternate.
        while self._header_posted() and self._header_request.Test():
            self._header_request = None
            header, body = self._receive_header(self._header_buffer.data)
            request = self._communicator.irecv(body, self._peer, self._body_tag) if body.size else None
            self._incoming.append((header, body, request))
            moved = True
        while self._incoming and (self._incoming[0][2] is None or self._incoming[0][2].Test()):
            header, body, _ = self._incoming.popleft()
            self._deliver(header, body)
            moved = True
        return moved

    def _header_posted(self) -> bool:
        """Post the receive of the next header if one may come; returns whether one is posted."""
        final = bool(self._incoming) and self._incoming[-1][0].type in FINAL_TYPES
        due = not self._closed and not final and len(self._incoming) < _MAX_RECEIVES
        if self._header_request is None and due:
            self._header_request = self._communicator.irecv(self._header_buffer, self._peer, self._header_tag)
        return self._header_request is not None

    @property
    def idle(self) -> bool:
        return not self._outgoing

    def close(self) -> None:
        # A link is closed after its final message has been received, so no receive is left posted.
        self._closed = True
