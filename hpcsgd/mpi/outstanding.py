"""Operations of one communicator that have begun and may not have ended, so that it can be freed after ranks
have left in the middle of them."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

_MOST_REQUESTS = 64  # completed ones are forgotten beyond
#: Collectives that one rank may be ahead of another so that they can be joined there.
MOST_SIGNATURES = 64

#: Kind of a collective, and its arguments: enough to join it with other data.
Signature = tuple[Any, ...]


class Outstanding:
    """The receives and collectives of a communicator, in the order in which they began."""

    def __init__(self) -> None:
        self.collectives = 0
        self._signatures: deque[Signature] = deque(maxlen=MOST_SIGNATURES)
        self._receives: list[Any] = []
        self._pending: list[Any] = []

    def receive(self, request: Any) -> Any:
        """Record and return the request of a receive."""
        if len(self._receives) > _MOST_REQUESTS:
            self._receives = list(filter(None, self._receives))  # false once complete
        self._receives.append(request)
        return request

    def collective(self, request: Any, *signature: Any) -> Any:
        """Record and return the request of a collective."""
        self.collectives += 1
        self._signatures.append(signature)
        if len(self._pending) > _MOST_REQUESTS:
            self._pending = list(filter(None, self._pending))
        self._pending.append(request)
        return request

    def signatures(self, first: int) -> list[Signature]:
        """Return the collectives from number `first` on, at most `MOST_SIGNATURES`."""
        return list(self._signatures)[len(self._signatures) - (self.collectives - first) :]

    def join(self, comm: Any, signatures: list[Signature]) -> None:
        """Join collectives that other ranks have begun, with memory of no meaning, so that they end there."""
        for signature in signatures:
            self.collective(_begin(comm, *signature), *signature)

    def cancel_receives(self) -> None:
        """Cancel the receives that have matched no message."""
        self._pending += filter(None, self._receives)
        for request in filter(None, self._receives):
            request.Cancel()
        self._receives = []

    def ended(self) -> bool:
        """Return whether all collectives, and the receives that were cancelled, have ended."""
        self._pending = [request for request in self._pending if request and not request.Test()]
        return not self._pending


def _begin(comm: Any, kind: str, *arguments: Any) -> Any:
    from mpi4py import MPI

    match kind, *arguments:
        case "barrier", *_:
            return comm.Ibarrier()
        case "broadcast", nbytes, root:
            return comm.Ibcast(np.zeros(nbytes, np.uint8), root)
        case "allreduce", count, datatype, op:
            kind_of = np.dtype(datatype)
            return comm.Iallreduce(MPI.IN_PLACE, np.zeros(count, kind_of), getattr(MPI, op))
        case "allgather", nbytes:
            return comm.Iallgather(np.zeros(nbytes, np.uint8), np.zeros(nbytes * comm.size, np.uint8))
        case "allgatherv", sizes:
            ends = np.cumsum(sizes)
            rows = [np.zeros(ends[-1], np.uint8), sizes, ends - sizes, MPI.BYTE]
            return comm.Iallgatherv(np.zeros(sizes[comm.rank], np.uint8), rows)
    raise AssertionError(kind)
