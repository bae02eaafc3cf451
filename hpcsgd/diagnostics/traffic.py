"""Bytes that a rank moves."""

from __future__ import annotations


class Traffic:
    """Bytes that this rank moved, counted where they leave.

    Attributes
    ----------
    sent
        Bytes given to MPI messages. MPI does not tell what one of its own collectives sends; for an
        all-reduce of B bytes over p ranks the bandwidth-optimal 2(p-1)/p * B is counted, for a
        broadcast B at the root.
    shared
        Bytes of other ranks' buffers that were read or written in the node's shared memory.
    saved
        Bytes that would have been moved on top of these without compression: of reductions, pushes, answers.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.shared = 0
        self.saved = 0
