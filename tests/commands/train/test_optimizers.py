"""Learning-rate schedules, and optimizers by name."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from hpcsgd import registry
from hpcsgd.commands.train.optimizers import OPTIMIZERS, learning_rate_schedule
from hpcsgd.commands.train.settings import KINDS, Settings

SCHEDULES = get_args(KINDS["schedule"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_is_a_straight_line_to_1(schedule: str) -> None:
    factor = learning_rate_schedule(schedule, 5, 100)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(5) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (0, 1), (3, 3), (9, 3), (2, 40)])
def test_factors_are_between_0_and_1_and_never_rise_again(schedule: str, warmup: int, total: int) -> None:
    factors = [learning_rate_schedule(schedule, warmup, total)(step) for step in range(total + 10)]
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)


def test_cosine_ends_at_0() -> None:
    factor = learning_rate_schedule("cosine", 10, 110)
    assert factor(60) == pytest.approx(0.5) and factor(35) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert factor(110) == factor(200) == 0.0


def test_step_is_a_tenth_after_half_and_again_after_three_quarters() -> None:
    factors = [learning_rate_schedule("step", 0, 8)(step) for step in range(10)]
    assert factors == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 4)


def test_constant_stays() -> None:
    assert {learning_rate_schedule("constant", 0, 5)(step) for step in range(9)} == {1.0}


@pytest.mark.parametrize(
    ("spec", "kind", "options"),
    [
        ("sgd:momentum=0.9,nesterov=yes", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        ("adam:betas=0.8x0.9", torch.optim.Adam, {"betas": (0.8, 0.9)}),
        ("adamw:weight_decay=0.2", torch.optim.AdamW, {"weight_decay": 0.2}),
        (Settings().optimizer, torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_optimizers_take_torchs_options(spec: str, kind: type, options: dict[str, object]) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    optimizer = registry.build(OPTIMIZERS, spec, "optimizer", params=parameters, lr=0.3)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.3 and {key: group[key] for key in options} == options
