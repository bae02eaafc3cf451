"""When rounds start, how much of one is merged, and the period that adapts: all from records alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcsgd.strategies.lasgd.averaging import RECORD
from hpcsgd.strategies.lasgd.schedule import Adaptive, Fixed, damping, wanted


def records(rounds: int = 1, cost: float = 0.0, drift: float = 0.0) -> Any:
    """Of three ranks, the fastest of which takes 20 ms a step; the model's norm is 10."""
    found = np.zeros(3, RECORD).view(np.recarray)
    found.rounds, found.step_seconds = rounds, [0.04, 0.02, 0.08]
    found.round_cost, found.norm = [cost / 2, cost, 0], 100
    found.squares = np.array([0.5, 1.0, 1.5]) * drift**2
    return found


@pytest.mark.parametrize(
    ("trigger", "since", "resting", "steps"),
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
def test_who_wants_a_round(trigger: Any, since: list[int], resting: list[int], steps: float) -> None:
    found = records()
    found.since, found.resting = since, resting
    assert wanted(found, trigger, 3) == steps


@pytest.mark.parametrize(
    ("seconds", "max_lag", "share"),
    [(0.0, None, 1.0), (0.02, None, 1.0), (0.05, None, 0.4), (0.2, None, 0.1), (0.2, 4, 0.25)],
)
def test_less_of_a_long_round_is_merged(seconds: float, max_lag: int | None, share: float) -> None:
    found = records()
    found.round_seconds = [seconds / 2, seconds, 0]
    assert damping(found, max_lag) == pytest.approx(share)
    found.step_seconds = 0
    assert damping(found, max_lag) == 1


def test_a_fixed_period_stays() -> None:
    assert Fixed(7).of(records(cost=1.0, drift=9.0)) == 7


@pytest.mark.parametrize(("cost", "period"), [(0.0, 1), (0.5e-3, 1), (0.7e-3, 2), (5.9e-3, 10), (1.0, 64)])
def test_rounds_take_a_small_share_of_the_fastest_rank(cost: float, period: int) -> None:
    assert Adaptive(None).of(records(cost=cost)) == period


def test_it_is_no_longer_than_it_may_be() -> None:
    assert Adaptive(3).of(records(cost=1.0)) == 3


def test_models_that_drift_apart_are_averaged_more_often() -> None:
    period = Adaptive(None)
    assert period.of(records(1, cost=5.9e-3, drift=0.19)) == 10
    assert period.of(records(2, cost=5.9e-3, drift=0.4)) == 5
    assert period.of(records(3, cost=5.9e-3, drift=0.8)) == 1
    assert period.of(records(4, cost=5.9e-3, drift=0.1)) == 10


def test_it_changes_after_a_round_and_not_before_any() -> None:
    period = Adaptive(None)
    assert period.of(records(0, cost=1.0)) == 1
    assert period.of(records(1, cost=5.9e-3, drift=0.4)) == 1
    assert period.of(records(1, cost=5.9e-3)) == 1
    assert period.of(records(2, cost=5.9e-3)) == 10
    unmeasured = records(3, cost=1.0)
    unmeasured.step_seconds = 0
    assert period.of(unmeasured) == 10
