"""Start of rounds, damping of merges, and the adaptive period: functions of the records alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcsgd.strategies.lasgd.averaging import RECORD
from hpcsgd.strategies.lasgd.schedule import AdaptivePeriod, FixedPeriod, damping, steps_until_round


def records(rounds: int = 1, cost: float = 0.0, drift: float = 0.0) -> Any:
    """Return the records of three ranks; the fastest takes 20 ms a step, the model's norm is 10."""
    found = np.zeros(3, RECORD).view(np.recarray)
    found.rounds, found.step_seconds = rounds, [0.04, 0.02, 0.08]
    found.round_cpu_seconds, found.squared_norm = [cost / 2, cost, 0], 100
    found.squared_distance = np.array([0.5, 1.0, 1.5]) * drift**2
    return found


@pytest.mark.parametrize(
    ("trigger", "since", "quiescing", "steps"),
    [
        ("any", [0, 3, 1], [0, 0, 0], 0),
        ("any", [2, 2, 1], [0, 0, 0], 1),
        ("any", [0, 3, 1], [0, 1, 0], 2),
        ("all", [3, 5, 2], [0, 0, 0], 1),
        ("all", [3, 5, 3], [0, 0, 0], 0),
        ("all", [3, 5, 0], [0, 0, 1], 0),
        ("all", [0, 5, 3], [0, 1, 1], 3),
        ("free", [0, 0, 1], [0, 0, 0], 0),
        ("free", [0, 0, 0], [0, 0, 0], 1),
    ],
)
def test_steps_until_a_round_by_trigger(
    trigger: Any, since: list[int], quiescing: list[int], steps: float
) -> None:
    found = records()
    found.steps_since_snapshot, found.quiescing = since, quiescing
    assert steps_until_round(found, trigger, 3) == steps


@pytest.mark.parametrize(
    ("seconds", "max_lag", "share"),
    [(0.0, None, 1.0), (0.02, None, 1.0), (0.05, None, 0.4), (0.2, None, 0.1), (0.2, 4, 0.25)],
)
def test_damping_of_a_long_round(seconds: float, max_lag: int | None, share: float) -> None:
    found = records()
    found.round_seconds = [seconds / 2, seconds, 0]
    assert damping(found, max_lag) == pytest.approx(share)
    found.step_seconds = 0
    assert damping(found, max_lag) == 1


def test_a_fixed_period_stays() -> None:
    assert FixedPeriod(7).update(records(cost=1.0, drift=9.0)) == 7


@pytest.mark.parametrize(("cost", "period"), [(0.0, 1), (0.5e-3, 1), (0.7e-3, 2), (5.9e-3, 10), (1.0, 64)])
def test_adaptive_period_bounds_the_cost_for_the_fastest_rank(cost: float, period: int) -> None:
    assert AdaptivePeriod(None).update(records(cost=cost)) == period


def test_adaptive_period_has_an_upper_limit() -> None:
    assert AdaptivePeriod(3).update(records(cost=1.0)) == 3


def test_adaptive_period_shortens_with_drift() -> None:
    period = AdaptivePeriod(None)
    assert period.update(records(1, cost=5.9e-3, drift=0.19)) == 10
    assert period.update(records(2, cost=5.9e-3, drift=0.4)) == 5
    assert period.update(records(3, cost=5.9e-3, drift=0.8)) == 1
    assert period.update(records(4, cost=5.9e-3, drift=0.1)) == 10


def test_adaptive_period_changes_only_after_a_measured_round() -> None:
    period = AdaptivePeriod(None)
    assert period.update(records(0, cost=1.0)) == 1
    assert period.update(records(1, cost=5.9e-3, drift=0.4)) == 1
    assert period.update(records(1, cost=5.9e-3)) == 1
    assert period.update(records(2, cost=5.9e-3)) == 10
    unmeasured = records(3, cost=1.0)
    unmeasured.step_seconds = 0
    assert period.update(unmeasured) == 10
