"""Counters of the bytes that a rank moves."""

from __future__ import annotations


class Traffic:
    """Counters of the bytes that this rank moved, counted at the sender.

    Attributes
    ----------
    sent
        Bytes of MPI messages. MPI does not report the bytes of its own collectives; for an all-reduce of B
        bytes over p ranks the bandwidth-optimal 2(p-1)/p * B is counted, for a broadcast B at the root.
    shared
        Bytes of other ranks' buffers that were read or written in the node's shared memory.
    saved
        Bytes that would have been moved in addition without compression, in reductions, pushes and pulls.
    """

    def __init__(self) -> None:
        self.sent = 0
        self.shared = 0
        self.saved = 0
