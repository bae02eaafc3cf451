"""Update rules, against NumPy and against torch on the whole model."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsgd.errors import BadOption
from hpcsgd.server.update_rules import (
    OPTIMIZERS,
    ElasticRule,
    OptimizerRule,
    UpdateContext,
    describe_optimizer,
    weighted_mean,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: Sums of half precision are computed in float32 and rounded once.
TIGHT = {torch.float32: 2e-7, torch.float64: 4e-16, torch.bfloat16: 8e-3}


def drawn(count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count * 1000 + size)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_elastic_is_its_formula(dtype: torch.dtype, count: int) -> None:
    centre, *pushes = drawn(count + 1, 3000, dtype)
    before, models = centre.double().clone(), [push.double().clone() for push in pushes]
    ElasticRule(0.25).apply(centre, pushes, UpdateContext([1.0] * count, count, []))
    forces = [0.25 * (model - before) for model in models]
    for push, force in zip(pushes, forces, strict=True):
        torch.testing.assert_close(push.double(), force, rtol=TIGHT[dtype], atol=TIGHT[dtype])
    bound = TIGHT[dtype] * 4 * count
    torch.testing.assert_close(centre.double(), before + sum(forces), rtol=bound, atol=bound)


@pytest.mark.parametrize(("clients", "alpha"), [(1, 0.9), (2, 0.45), (3, 0.3), (0, 0.9)])
def test_elastic_alpha_defaults_to_the_stable_value_for_the_clients(clients: int, alpha: float) -> None:
    centre, push = drawn(2, 10, torch.float64)
    expected = alpha * (push - centre)
    ElasticRule().apply(centre, [push], UpdateContext([1.0], clients, []))
    torch.testing.assert_close(push, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(weights=st.lists(st.sampled_from([1.0, 2.0, 3.0, 128.0]), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_mean_is_weighted_by_gradients(dtype: torch.dtype, weights: list[float]) -> None:
    pushes = drawn(len(weights), 2500, dtype)
    wanted = sum(w * p.double() for w, p in zip(weights, pushes, strict=True)) / sum(weights)
    found = weighted_mean(list(zip(pushes, weights, strict=True)))
    assert found is pushes[0]
    bound = TIGHT[dtype] * 4
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_push_of_weight_0_is_ignored(dtype: torch.dtype) -> None:
    options = [{"lr": 1.0}]
    rule = OptimizerRule("SGD", [(0, 7, 0)])
    centre, good = torch.zeros(7, dtype=dtype), torch.ones(7, dtype=dtype)
    bad = torch.full((7,), float("nan"), dtype=dtype)
    rule.apply(centre, [bad.clone(), good, bad.clone()], UpdateContext([0.0, 2.0, 0.0], 3, options))
    assert torch.equal(centre, -torch.ones(7, dtype=dtype))
    rule.apply(centre, [bad], UpdateContext([0.0], 3, options))
    assert torch.equal(centre, -torch.ones(7, dtype=dtype))


EXTRA: dict[str, dict[str, object]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"betas": (0.8, 0.9)},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "NAdam": {"weight_decay": 0.01},
    "ASGD": {"t0": 2},
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_shards_is_torchs_on_the_whole_model(
    name: str, dtype: torch.dtype, fused: bool
) -> None:
    """With shard boundaries anywhere, two parameter groups and changing learning rates."""
    model = [torch.nn.Parameter(t) for t in (*drawn(2, 30, dtype), *drawn(1, 11, dtype))]
    groups = [{"params": model[:2]}, {"params": model[2:], "lr": 0.003}]
    own = getattr(torch.optim, name)(groups, lr=0.01, **EXTRA.get(name, {}))
    flat = torch.cat([p.detach().clone() for p in model])
    # A shard boundary is inside a parameter, and one shard has both parameter groups.
    rules = [
        (0, 17, OptimizerRule(name, [(0, 17, 0)])),
        (17, 71, OptimizerRule(name, [(0, 43, 0), (43, 54, 1)])),
    ]
    for step in range(6):
        for group in own.param_groups:
            group["lr"] *= 1.0 if step % 2 else 0.7
        for p in model:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        gradient = torch.cat([p.grad for p in model if p.grad is not None])
        options = describe_optimizer(own)[1]
        if not fused:
            options = [{k: v for k, v in group.items() if k != "fused"} for group in options]
        for start, stop, rule in rules:
            rule.validate(options, dtype)
            rule.apply(flat[start:stop], [gradient[start:stop].clone()], UpdateContext([1.0], 1, options))
        own.step()
    wanted = torch.cat([p.detach() for p in model])
    torch.testing.assert_close(flat, wanted, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-9)
    assert not torch.allclose(wanted, torch.cat([*drawn(2, 30, dtype), *drawn(1, 11, dtype)]), atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_continues_with_the_same_bits(name: str) -> None:
    own = getattr(torch.optim, name)([torch.zeros(1, requires_grad=True)], **EXTRA.get(name, {}))
    terms = UpdateContext([1.0], 1, describe_optimizer(own)[1])
    first, second = (OptimizerRule(name, [(0, 8, 0), (8, 20, 0)]) for _ in range(2))
    gradients, centre = drawn(6, 20, torch.float32), torch.zeros(20)
    for gradient in gradients[:3]:
        first.apply(centre, [gradient.clone()], terms)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.validate(terms.options, torch.float32)
    other = centre.clone()
    for gradient in gradients[3:]:
        first.apply(centre, [gradient.clone()], terms)
        second.apply(other, [gradient.clone()], terms)
    assert torch.equal(centre, other)


@pytest.mark.parametrize(
    "options",
    [
        [],
        [3],
        [{"lr": -1.0}],
        [{"lr": "fast"}],
        [{"lr": None}],
        [{"lr": 0.1, "speed": 3}],
        [{"lr": 0.1, "params": []}],
        [{"lr": 0.1, "momentum": -1.0}],
        [{"lr": 0.1, "number": 7}],
        [{"lr": 0.1, "fused": True, "foreach": True}],
        [{"lr": 1e300}],
    ],
    ids=str,
)
def test_invalid_options_fail_validation(options: list[dict[str, object]]) -> None:
    with pytest.raises(Exception):  # noqa: B017  # of whatever kind
        OptimizerRule("SGD", [(0, 4, 0)]).validate(options, torch.float32)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("Adam", {}, {"amsgrad": True}),
        ("RMSprop", {}, {"centered": True}),
        ("RMSprop", {}, {"momentum": 0.9}),
    ],
)
def test_options_that_contradict_the_state_fail_validation(
    name: str, before: dict[str, object], after: dict[str, object]
) -> None:
    rule, centre = OptimizerRule(name, [(0, 4, 0)]), torch.zeros(4)
    rule.apply(centre, [torch.ones(4)], UpdateContext([1.0], 1, [{"lr": 0.1, **before}]))
    expected = centre.clone()
    rule.validate([{"lr": 0.2, **before}], torch.float32)
    with pytest.raises(KeyError):
        rule.validate([{"lr": 0.1, **after}], torch.float32)
    assert torch.equal(centre, expected)
    saved = rule.state_dict()
    assert all(int(state["step"]) == 1 for state in saved["state"].values())


def test_optimizers_that_are_not_elementwise_are_rejected() -> None:
    parameter = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(BadOption, match="LBFGS"):
        describe_optimizer(torch.optim.LBFGS([parameter]))

    class Own(torch.optim.SGD):
        pass

    with pytest.raises(BadOption, match="Own"):
        describe_optimizer(Own([parameter], lr=0.1))


def test_options_are_json_compatible() -> None:
    for name, lr in itertools.product(OPTIMIZERS, (0.1, torch.tensor(0.1))):
        if isinstance(lr, Tensor) and name not in ("SGD", "Adam"):
            continue
        optimizer = getattr(torch.optim, name)([torch.zeros(1, requires_grad=True)], lr=lr)
        optimizer.param_groups[0]["initial_lr"] = 0.1  # as a scheduler does
        described = json.loads(json.dumps(describe_optimizer(optimizer)))
        assert described[0] == name and described[1][0]["lr"] == pytest.approx(0.1)
        OptimizerRule(name, [(0, 3, 0)]).validate(described[1], torch.float32)
