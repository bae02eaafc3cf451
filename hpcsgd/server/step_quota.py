"""Step quotas: shares of a number of steps with which all clients finish at about the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from hpcsgd.server.session import Session

#: Durations of steps are estimates: a client that would finish late by less than this factor takes one more.
_TOLERANCE = 1.5


def record(session: Session, steps: int) -> None:
    """Record a grant of `steps`; the time since the last grant is the duration of its steps."""
    now = time.monotonic()
    if session.quota:
        session.step_seconds = (now - session.quota_granted_at) / session.quota
    session.quota, session.quota_granted_at = steps, now


def grant(session: Session, steps: int, remaining: int, sessions: Iterable[Session]) -> int:
    """Return the number of steps that a client may take now, at most the requested `steps`.

    It is smaller than requested if the client would still be busy when the others have finished the remaining
    steps, and 0 if they will finish before it could complete one. It is never 0 for the fastest client, so
    progress is guaranteed.
    """
    steps, own_seconds = min(steps, remaining), session.step_seconds
    # Clients without a quota will take no more steps.
    running = [c for c in sessions if c is not session and c.quota and c.is_awaited]
    other_seconds = [c.step_seconds for c in running if c.step_seconds]
    if steps <= 0 or not own_seconds or not other_seconds:
        return max(0, steps)
    combined_rate = sum(1 / seconds for seconds in other_seconds)
    if own_seconds > _TOLERANCE * max(min(other_seconds), remaining / combined_rate):
        return 0
    return min(steps, max(1, math.ceil(remaining / (own_seconds * (combined_rate + 1 / own_seconds)))))
