"""What a server does with pushes, against NumPy and against torch on the whole model."""

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
from hpcsgd.server.update_rules import OPTIMIZERS, Descent, Elastic, Terms, average, describe

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: Of half precisions sums are made in float32, and rounded once.
TIGHT = {torch.float32: 2e-7, torch.float64: 4e-16, torch.bfloat16: 8e-3}


def drawn(count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count * 1000 + size)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_elastic_is_its_formula(dtype: torch.dtype, count: int) -> None:
    centre, *pushes = drawn(count + 1, 3000, dtype)
    before, models = centre.double().clone(), [push.double().clone() for push in pushes]
    Elastic(0.25).apply(centre, pushes, Terms([1.0] * count, count, []))
    forces = [0.25 * (model - before) for model in models]
    for push, force in zip(pushes, forces, strict=True):
        torch.testing.assert_close(push.double(), force, rtol=TIGHT[dtype], atol=TIGHT[dtype])
    bound = TIGHT[dtype] * 4 * count
    torch.testing.assert_close(centre.double(), before + sum(forces), rtol=bound, atol=bound)


@pytest.mark.parametrize(("clients", "alpha"), [(1, 0.9), (2, 0.45), (3, 0.3), (0, 0.9)])
def test_elastic_takes_a_share_that_is_stable_for_so_many(clients: int, alpha: float) -> None:
    centre, push = drawn(2, 10, torch.float64)
    expected = alpha * (push - centre)
    Elastic().apply(centre, [push], Terms([1.0], clients, []))
    torch.testing.assert_close(push, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(weights=st.lists(st.sampled_from([1.0, 2.0, 3.0, 128.0]), min_size=1, max_size=5))
@settings(max_examples=15, deadline=None)
def test_a_mean_counts_gradients(dtype: torch.dtype, weights: list[float]) -> None:
    pushes = drawn(len(weights), 2500, dtype)
    wanted = sum(w * p.double() for w, p in zip(weights, pushes, strict=True)) / sum(weights)
    found = average(list(zip(pushes, weights, strict=True)))
    assert found is pushes[0]
    bound = TIGHT[dtype] * 4
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_counts_for_nothing_may_be_anything(dtype: torch.dtype) -> None:
    options = [{"lr": 1.0}]
    rule = Descent("SGD", [(0, 7, 0)])
    centre, good = torch.zeros(7, dtype=dtype), torch.ones(7, dtype=dtype)
    bad = torch.full((7,), float("nan"), dtype=dtype)
    rule.apply(centre, [bad.clone(), good, bad.clone()], Terms([0.0, 2.0, 0.0], 3, options))
    assert torch.equal(centre, -torch.ones(7, dtype=dtype))
    rule.apply(centre, [bad], Terms([0.0], 3, options))
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
    """Cut anywhere, with two groups of parameters and steps of changing length."""
    model = [torch.nn.Parameter(t) for t in (*drawn(2, 30, dtype), *drawn(1, 11, dtype))]
    groups = [{"params": model[:2]}, {"params": model[2:], "lr": 0.003}]
    own = getattr(torch.optim, name)(groups, lr=0.01, **EXTRA.get(name, {}))
    flat = torch.cat([p.detach().clone() for p in model])
    # Shards end inside of a parameter, and in one there are both groups.
    rules = [(0, 17, Descent(name, [(0, 17, 0)])), (17, 71, Descent(name, [(0, 43, 0), (43, 54, 1)]))]
    for step in range(6):
        for group in own.param_groups:
            group["lr"] *= 1.0 if step % 2 else 0.7
        for p in model:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        gradient = torch.cat([p.grad for p in model if p.grad is not None])
        options = describe(own)[1]
        if not fused:
            options = [{k: v for k, v in group.items() if k != "fused"} for group in options]
        for start, stop, rule in rules:
            rule.try_out(options, dtype)
            rule.apply(flat[start:stop], [gradient[start:stop].clone()], Terms([1.0], 1, options))
        own.step()
    wanted = torch.cat([p.detach() for p in model])
    torch.testing.assert_close(flat, wanted, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=1e-9)
    assert not torch.allclose(wanted, torch.cat([*drawn(2, 30, dtype), *drawn(1, 11, dtype)]), atol=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_who_takes_over_a_state_goes_on_as_its_owner(name: str) -> None:
    own = getattr(torch.optim, name)([torch.zeros(1, requires_grad=True)], **EXTRA.get(name, {}))
    terms = Terms([1.0], 1, describe(own)[1])
    first, second = (Descent(name, [(0, 8, 0), (8, 20, 0)]) for _ in range(2))
    gradients, centre = drawn(6, 20, torch.float32), torch.zeros(20)
    for gradient in gradients[:3]:
        first.apply(centre, [gradient.clone()], terms)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.try_out(terms.options, torch.float32)
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
def test_options_that_would_fail_are_found_before_they_do(options: list[dict[str, object]]) -> None:
    with pytest.raises(Exception):  # noqa: B017  # of whatever kind
        Descent("SGD", [(0, 4, 0)]).try_out(options, torch.float32)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("Adam", {}, {"amsgrad": True}),
        ("RMSprop", {}, {"centered": True}),
        ("RMSprop", {}, {"momentum": 0.9}),
    ],
)
def test_options_that_do_not_fit_the_state_are_found(
    name: str, before: dict[str, object], after: dict[str, object]
) -> None:
    rule, centre = Descent(name, [(0, 4, 0)]), torch.zeros(4)
    rule.apply(centre, [torch.ones(4)], Terms([1.0], 1, [{"lr": 0.1, **before}]))
    kept = centre.clone()
    rule.try_out([{"lr": 0.2, **before}], torch.float32)
    with pytest.raises(KeyError):
        rule.try_out([{"lr": 0.1, **after}], torch.float32)
    assert torch.equal(centre, kept)
    saved = rule.state_dict()
    assert all(int(state["step"]) == 1 for state in saved["state"].values())


def test_only_optimizers_that_treat_elements_alike_are_taken() -> None:
    parameter = torch.zeros(2, 2, requires_grad=True)
    with pytest.raises(BadOption, match="LBFGS"):
        describe(torch.optim.LBFGS([parameter]))

    class Own(torch.optim.SGD):
        pass

    with pytest.raises(BadOption, match="Own"):
        describe(Own([parameter], lr=0.1))


def test_options_are_told_in_plain_values() -> None:
    for name, lr in itertools.product(OPTIMIZERS, (0.1, torch.tensor(0.1))):
        if isinstance(lr, Tensor) and name not in ("SGD", "Adam"):
            continue
        optimizer = getattr(torch.optim, name)([torch.zeros(1, requires_grad=True)], lr=lr)
        optimizer.param_groups[0]["initial_lr"] = 0.1  # as a scheduler does
        told = json.loads(json.dumps(describe(optimizer)))
        assert told[0] == name and told[1][0]["lr"] == pytest.approx(0.1)
        Descent(name, [(0, 3, 0)]).try_out(told[1], torch.float32)
