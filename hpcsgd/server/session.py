"""State that a server holds for each client."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from hpcsgd.server.protocol import Header, Link, ProtocolError
from hpcsgd.server.shard import Shard
from hpcsgd.server.update_rules import Options


@dataclass
class Session:
    """State of one client: a gateway rank of a group, over all of its links."""

    name: str  # unique name of the client
    link: Link | None  # current link; None while it is disconnected
    shards: frozenset[int]  # indices of the shards that it pushes and pulls
    options: Options  # options of its optimizer
    #: Whether its lease is valid: it is connected, or has been until now, and is not silent for too long.
    alive: bool = True
    paused: bool = True  # whether it has announced that it will not push
    done: bool = False  # whether it has closed its session
    subscribed: set[int] = field(default_factory=set)  # shards whose values it has received
    #: By shard: header of the reply to a push, which waits for the pushes of other clients.
    pending_replies: dict[int, Header] = field(default_factory=dict)
    #: By shard: memory for one push and its reply.
    buffers: dict[int, np.ndarray] = field(default_factory=dict)
    #: Histogram: number of pushes by the number of updates of others that they had missed.
    staleness: Counter[int] = field(default_factory=Counter)
    dropped: int = 0  # number of pushes that came too late
    #: Bytes over its earlier links.
    received: int = 0
    sent: int = 0
    seed: int | None = None  # seed of the order of its data; None if it has sent none
    #: Steps that it was last granted, and when.
    quota: int = 0
    quota_granted_at: float = 0.0
    step_seconds: float = 0.0  # duration of one of its steps; 0 while unknown
    #: While it is disconnected: when it was last connected, or the server started; by `time.monotonic`.
    last_seen: float = field(default_factory=time.monotonic)

    @property
    def is_awaited(self) -> bool:
        """Whether updates and replies wait for its pushes."""
        return self.alive and not self.paused and not self.done

    @property
    def silent_for(self) -> float:
        """Seconds since its last message."""
        return time.monotonic() - (self.last_seen if self.link is None else self.link.last_received)

    def buffer(self, shard: Shard) -> np.ndarray:
        """Memory for a push to a shard, and for its reply."""
        if shard.index not in self.buffers:
            try:
                self.buffers[shard.index] = np.empty(shard.nbytes, np.uint8)
            except (MemoryError, ValueError):
                text = f"the server has no memory for the {shard.nbytes} bytes of its shard"
                raise ProtocolError(text) from None
        return self.buffers[shard.index]
