"""What a server knows of one of its clients."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from hpcsgd.server.protocol import Head, Link, Malformed
from hpcsgd.server.shard import Shard
from hpcsgd.server.update_rules import Options


@dataclass
class Client:
    """One connection's other side: a rank that talks for its group.

    Attributes
    ----------
    name
        As it calls itself; unique.
    link
        The connection; None: it is gone.
    shards
        Of which it has a part in the updates.
    options
        Its optimizer's.
    waited_for
        Whether updates and answers wait for its pushes.
    resting
        Whether it has said that none will come.
    done
        Whether it has said goodbye.
    has
        The shards whose values it has been given.
    owed
        Of each shard whose push has been counted in, the answer that waits until other clients are as far.
    buffers
        Memory for one push, and its answer, of each shard.
    behind
        Of each push that waits, how many updates of others it has missed.
    staleness
        How often a push was behind by so many updates of others.
    left_out
        How many pushes came too late.
    received, sent
        Bytes over links that it has had before this one.
    seed
        Of the order of its data, where it has told.
    leave, leave_at
        How many steps it was last allowed to take, and when.
    step_seconds
        What one of its steps takes; 0: not known.
    since
        When it came, or the server did, by `time.monotonic`.
    """

    name: str
    link: Link | None
    shards: frozenset[int]
    options: Options
    waited_for: bool = True
    resting: bool = True
    done: bool = False
    has: set[int] = field(default_factory=set)
    owed: dict[int, Head] = field(default_factory=dict)
    buffers: dict[int, np.ndarray] = field(default_factory=dict)
    behind: dict[int, int] = field(default_factory=dict)
    staleness: Counter[int] = field(default_factory=Counter)
    left_out: int = 0
    received: int = 0
    sent: int = 0
    seed: int | None = None
    leave: int = 0
    leave_at: float = 0.0
    step_seconds: float = 0.0
    since: float = field(default_factory=time.monotonic)

    @property
    def counts(self) -> bool:
        """Whether others wait for it."""
        return self.waited_for and not self.resting and not self.done

    @property
    def silent_for(self) -> float:
        """Seconds since something came from it."""
        return time.monotonic() - (self.since if self.link is None else self.link.heard)

    def buffer(self, shard: Shard) -> np.ndarray:
        """Memory for a push of a shard, and its answer."""
        if shard.index not in self.buffers:
            try:
                self.buffers[shard.index] = np.empty(shard.nbytes, np.uint8)
            except (MemoryError, ValueError):
                raise Malformed(f"there is no memory for the {shard.nbytes} bytes of its shard") from None
        return self.buffers[shard.index]
