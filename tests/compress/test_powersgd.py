"""PowerSGD: exact where the rank suffices, better with every step where not, and resumed as it was."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hpcsgd.compress.base import Segment
from hpcsgd.compress.powersgd import PowerSGD
from tests.support.devices import normal, on_device
from tests.support.simulated_codecs import Lockstep

SHAPES = ((24, 16), (9,), (8, 3, 5), (1, 40), (30, 30))


def segment_of(ranks: int) -> Segment:
    """With gaps between the tensors."""
    tensors, end = [], 0
    for shape in SHAPES:
        tensors.append((end, shape))
        end += torch.Size(shape).numel() + 7
    return Segment(end, ranks, tensors=tuple(tensors), device=torch.get_default_device())


def matrix(ranks: int) -> Segment:
    return Segment(900, ranks, tensors=((0, (30, 30)),), device=torch.get_default_device())


def of_rank(rank: int, ranks: int, seed: int = 0) -> Tensor:
    """Matrices whose sum over the ranks has rank `rank`: all of them have the same columns."""
    generator = torch.Generator("cpu").manual_seed(seed)
    segment = segment_of(ranks)
    rows = torch.randn(ranks, segment.numel, generator=generator, device="cpu")
    for start, shape in segment.tensors:
        if len(shape) > 1:
            height = shape[0]
            width = torch.Size(shape).numel() // height
            left = torch.randn(height, rank, generator=generator, device="cpu")
            for row in rows:
                right = torch.randn(rank, width, generator=generator, device="cpu")
                row[start : start + height * width] = (left @ right).flatten()
    return on_device(rows)


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_exact_where_the_rank_suffices(rank: int, ranks: int) -> None:
    rows = of_rank(rank, ranks)
    for feedback in (False, True):
        lock = Lockstep(PowerSGD(rank), segment_of(ranks), feedback)
        for step in range(3):
            assert relative(lock.reduce(rows, step, 1 / ranks)[0], rows.mean(0)) < 1e-5
            assert not feedback or max(float(rest.norm()) for rest in lock.residuals) < 1e-4


def test_tensors_other_than_large_matrices_are_sent_uncompressed() -> None:
    segment = segment_of(2)
    rows = normal(2, segment.numel, seed=1)
    lock = Lockstep(PowerSGD(4), segment, True)
    out = lock.reduce(rows)[0]
    inside = torch.zeros(segment.numel, dtype=torch.bool)
    for start, shape in segment.tensors:
        size = torch.Size(shape).numel()
        if len(shape) > 1 and 4 * (shape[0] + size // shape[0]) < size:
            inside[start : start + size] = True
    assert torch.equal(out[~inside], rows.sum(0)[~inside])
    assert all(not residual[~inside].any() and residual[inside].any() for residual in lock.residuals)
    assert inside.sum() == 24 * 16 + 8 * 15 + 30 * 30


def test_the_factors_of_the_last_step_are_a_warm_start() -> None:
    ranks, rank = 3, 2
    rows = normal(ranks, 900, seed=2)
    u, s, v = torch.linalg.svd(rows.mean(0).view(30, 30))
    s *= 0.8 ** torch.arange(30)
    rows += (u * s @ v).flatten() - rows.mean(0)
    best = float(s[rank:].norm())
    lock = Lockstep(PowerSGD(rank), matrix(ranks), False)
    errors = [float((lock.reduce(rows, step, 1 / ranks)[0] - rows.mean(0)).norm()) for step in range(40)]
    assert errors[0] > 1.05 * best and errors[-1] < 1.005 * best
    assert all(later < earlier * (1 + 1e-5) for earlier, later in pairwise(errors))


def test_feedback_sends_everything_in_the_end() -> None:
    rows, segment = normal(2, 900, seed=3), matrix(2)
    lock = Lockstep(PowerSGD(2), segment, True)
    total = torch.zeros(900)
    for step in range(60):
        total += lock.reduce(rows, step, 1 / 2)[0]
    assert relative(total / 60, rows.mean(0)) < 0.2
    alone = Lockstep(PowerSGD(2), segment, False)
    assert relative(sum(alone.reduce(rows, t, 1 / 2)[0] for t in range(60)) / 60, rows.mean(0)) > 0.5


def test_a_resumed_codec_goes_on_with_the_same_bits() -> None:
    rows = of_rank(5, 2)
    straight, resumed = (Lockstep(PowerSGD(2), segment_of(2), False) for _ in range(2))
    for step in range(3):
        straight.reduce(rows, step)
    states = [copy.deepcopy(codec.state_dict()) for codec in straight.codecs]
    expected = straight.reduce(rows, 3)
    cold = resumed.reduce(rows, 3)
    assert not torch.equal(cold, expected)
    for codec, state in zip(resumed.codecs, states, strict=True):
        codec.load_state_dict(state)
    assert torch.equal(resumed.reduce(rows, 3), expected)


def test_a_gradient_of_zeros_does_not_affect_later_steps() -> None:
    rows = of_rank(2, 2)
    lock = Lockstep(PowerSGD(2), segment_of(2), False)
    lock.reduce(rows, 0)
    assert not lock.reduce(torch.zeros_like(rows), 1).any()
    for step in (2, 3):
        out = lock.reduce(rows, step, 1 / 2)[0]
    assert relative(out, rows.mean(0)) < 1e-5
