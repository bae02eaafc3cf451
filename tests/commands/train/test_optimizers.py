"""Learning-rate schedules, and optimizers by name."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from hpcsgd.commands.options import OPTIMIZERS
from hpcsgd.commands.train.optimizers import build, learning_rate_schedule
from hpcsgd.commands.train.settings import KINDS, Settings
from tests.support.launch import run_alone

SPECS = ["sgd:momentum=0.9,nesterov=yes", "adam", "adamw:weight_decay=0.2"]
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
    optimizer = build(spec, parameters, 0.3)
    assert isinstance(optimizer, kind) and type(optimizer).__name__ == kind.__name__
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.3 and {key: group[key] for key in options} == options


@pytest.mark.parametrize("spec", SPECS)
def test_pickles_are_torchs_own(spec: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = build(spec, layer.parameters(), 0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(other) is type(optimizer).__mro__[1]
        assert str(other.state_dict()) == str(optimizer.state_dict())
        other.step()


@pytest.mark.parametrize("spec", SPECS)
def test_optimizers_take_torchs_steps(spec: str) -> None:
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    optimizer = build(spec, [parameters[0]], 0.3)
    kind, group = type(optimizer).__bases__[0], optimizer.param_groups[0]
    expected = kind(
        [parameters[1]],
        **{key: group[key] for key in group if key not in ("params", "decoupled_weight_decay")},
    )
    for step in range(3):
        for each, parameter in zip((optimizer, expected), parameters, strict=True):
            each.zero_grad()
            (parameter.sin() * (step + 1)).sum().backward()
            each.step()
        if step == 1:
            optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(*parameters) and torch.equal(
        *(each.grad for each in parameters if each.grad is not None)
    )


#: Prints a line for each optimizer: its name, the status, and the modules of the compiler.
WITHOUT_COMPILER = """
import sys
from hpcsgd.commands.cli import main
*words, optimizers = sys.argv
for optimizer in optimizers.split():
    sys.argv = [*words, "--name", optimizer, "--optimizer", optimizer]
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    print("ended:", optimizer, status or 0, sorted({"torch._dynamo", "torch._inductor"} & {*sys.modules}))
"""


def test_the_compiler_is_not_imported(tmp_path: Path) -> None:
    words = f"train --data synthetic:samples=64 --epochs 1 --out {tmp_path} --progress off"
    done = run_alone(WITHOUT_COMPILER, *words.split(), " ".join(OPTIMIZERS))
    ended = [line for line in done.stdout.splitlines() if line.startswith("ended: ")]
    assert done.returncode == 0 and ended == [f"ended: {name} 0 []" for name in OPTIMIZERS], done
