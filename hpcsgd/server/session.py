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
    """State of one client: a gateway rank of a group, over all of its links.

    Attributes
    ----------
    name
        Unique name of the client.
    link
        Current link; None while it is disconnected.
    shards
        Indices of the shards that it pushes and pulls.
    options
        Options of its optimizer.
    alive
        Whether its lease is valid: it is connected, or has been until now, and is not silent for too long.
    paused
        Whether it has announced that it will not push.
    done
        Whether it has closed its session.
    subscribed
        Shards whose values it has received.
    pending_replies
        By shard: header of the reply to a push, which waits for the pushes of other clients.
    buffers
        By shard: memory for one push and its reply.
    staleness
        Histogram: number of pushes by the number of updates of others that they had missed.
    dropped
        Number of pushes that came too late.
    received, sent
        Bytes over its earlier links.
    seed
        Seed of the order of its data; None if it has sent none.
    quota, quota_granted_at
        Steps that it was last granted, and when.
    step_seconds
        Duration of one of its steps; 0 while unknown.
    last_seen
        While it is disconnected: when it was last connected, or the server started; by `time.monotonic`.
    """

    name: str
    link: Link | None
    shards: frozenset[int]
    options: Options
    alive: bool = True
    paused: bool = True
    done: bool = False
    subscribed: set[int] = field(default_factory=set)
    pending_replies: dict[int, Header] = field(default_factory=dict)
    buffers: dict[int, np.ndarray] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    dropped: int = 0
    received: int = 0
    sent: int = 0
    seed: int | None = None
    quota: int = 0
    quota_granted_at: float = 0.0
    step_seconds: float = 0.0
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
