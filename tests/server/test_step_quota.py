"""Steps are shared so that all clients are through at about the same time, and all steps are taken."""

from __future__ import annotations

import heapq
import random

import pytest

from hpcsgd.server import step_quota
from hpcsgd.server.session import Client


def client(name: str) -> Client:
    found = Client(name, None, frozenset(), [])
    found.resting = False
    return found


@pytest.mark.parametrize("seconds", [[1.0], [1, 1, 1, 1], [1, 1, 1, 4], [1, 2, 3, 50], [0.3, 7.0]], ids=str)
@pytest.mark.parametrize("interval", [1, 8])
def test_all_steps_are_taken_and_all_are_through_together(
    seconds: list[float], interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for goal in (1, 7, 40, 333):
        clients, now, begun = [client(str(i)) for i in range(len(seconds))], 0.0, 0
        monkeypatch.setattr(step_quota.time, "monotonic", lambda: now)  # noqa: B023
        rng = random.Random(goal)
        asking = [(0.0, i) for i in range(len(seconds))]
        while asking:
            now, i = heapq.heappop(asking)
            steps = step_quota.share(clients[i], interval, goal - begun, clients)
            step_quota.note(clients[i], steps)
            begun += steps
            if steps:
                heapq.heappush(asking, (now + steps * seconds[i] * rng.uniform(0.95, 1.05), i))
        assert begun == goal
        if goal == 333:  # but for the first steps, of which nobody knows how long they take
            ideal = max(goal / sum(1 / s for s in seconds), interval * max(seconds))
            assert now < 1.05 * ideal + 2.5 * max(seconds)
