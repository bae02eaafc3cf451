"""Leave to take steps: who shares a number of steps, so that all are through at about the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from hpcsgd.server.session import Client

#: Steps take about so long, not just so long: who would be late by less than this factor takes one more.
_LATE = 1.5


def note(client: Client, steps: int) -> None:
    """A client asks for more: this is how long its last steps took; and so many it may take now."""
    now = time.monotonic()
    if client.leave:
        client.step_seconds = (now - client.leave_at) / client.leave
    client.leave, client.leave_at = steps, now


def share(client: Client, steps: int, left: int, clients: Iterable[Client]) -> int:
    """How many of the steps that are left a client may take now, at most `steps`.

    Less than it asks for, where it would still be at them when the others have taken the rest; none, where
    the others will have taken all that is left before it were through with one. Of the fastest client that
    is never true: somebody always goes on.
    """
    steps, own = min(steps, left), client.step_seconds
    # Who has none under way will take none either.
    at_it = [c for c in clients if c is not client and c.leave and c.counts]
    others = [c.step_seconds for c in at_it if c.step_seconds]
    if steps <= 0 or not own or not others:
        return max(0, steps)
    together = sum(1 / seconds for seconds in others)
    if own > _LATE * max(min(others), left / together):
        return 0
    return min(steps, max(1, math.ceil(left / (own * (together + 1 / own)))))
