"""Step quotas: all steps are taken, and all clients finish at about the same time."""

from __future__ import annotations

import heapq
import random

import pytest

from hpcsgd.server import step_quota
from hpcsgd.server.session import Session


def client(name: str) -> Session:
    found = Session(name, None, frozenset(), [])
    found.paused = False
    return found


@pytest.mark.parametrize("seconds", [[1.0], [1, 1, 1, 1], [1, 1, 1, 4], [1, 2, 3, 50], [0.3, 7.0]], ids=str)
@pytest.mark.parametrize("interval", [1, 8])
def test_all_steps_are_taken_and_clients_finish_together(
    seconds: list[float], interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for goal in (1, 7, 40, 333):
        clients, now, begun = [client(str(i)) for i in range(len(seconds))], 0.0, 0
        monkeypatch.setattr(step_quota.time, "monotonic", lambda: now)  # noqa: B023
        rng = random.Random(goal)
        asking = [(0.0, i) for i in range(len(seconds))]
        while asking:
            now, i = heapq.heappop(asking)
            steps = step_quota.grant(clients[i], interval, goal - begun, clients)
            step_quota.record(clients[i], steps)
            begun += steps
            if steps:
                heapq.heappush(asking, (now + steps * seconds[i] * rng.uniform(0.95, 1.05), i))
        assert begun == goal
        if goal == 333:  # except for the first steps, whose duration is unknown
            ideal = max(goal / sum(1 / s for s in seconds), interval * max(seconds))
            assert now < 1.05 * ideal + 2.5 * max(seconds)
