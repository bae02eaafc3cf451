"""Monte Carlo: expectation, variance and independence of the random numbers of compression."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcsgd.compress import build
from hpcsgd.compress.base import Segment
from tests.support.simulated_codecs import Lockstep

pytestmark = pytest.mark.host("random numbers of the host's kernels")
NUMEL = 1024
#: Of |z| over all elements: of 10,000 normal numbers one in 2000 runs has one beyond, and seeds are fixed.
LARGEST_Z = 5.5

UNBIASED = [
    "maxnorm:bits=2",
    "maxnorm:bits=4",
    "maxnorm:bits=4,scale=bucket,norm=euclidean",
    "maxnorm:bits=7,scale=tensor",
    "multiscale",
    "multiscale:bits=2x4x8,scale=bucket",
    "randk:ratio=0.3",
    "randk-maxnorm:ratio=0.3,bits=4",
    "randk-multiscale:ratio=0.3,bits=3x6",
    "hadamard+maxnorm:bits=3",
    "hadamard+randk-maxnorm:ratio=0.5",
]


def gradients(ranks: int, numel: int = NUMEL) -> torch.Tensor:
    """Of which some elements are much larger than the others, and one is 1, the norm."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((ranks, numel)) * np.exp(rng.standard_normal(numel))
    x *= 0.9 / np.abs(x).max()
    x[0, 5] = 1
    return torch.from_numpy(x).float()


def means(spec: str, rows: torch.Tensor, trials: int, seed: int = 3) -> torch.Tensor:
    """The mean of the ranks as compression gives it, (trials, numel), float64."""
    ranks, numel = rows.shape
    lock = Lockstep(
        build(spec), Segment(numel, ranks, tensors=((0, (numel // 2,)), (numel // 2, (4,)))), False, seed
    )
    return torch.stack([lock.reduce(rows, step, 1 / ranks)[0].double() for step in range(trials)])


def z_scores(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """How many standard errors the mean is off; of elements that are often rounded both ways."""
    spread = samples.std(0) / len(samples) ** 0.5
    often = (samples != samples.median(0)[0]).sum(0) >= 20
    assert often.float().mean() > 0.5
    return ((samples.mean(0) - truth) / (spread + 2.0**-22 * truth.abs()))[often]


def z_of_all(samples: torch.Tensor, truth: torch.Tensor) -> float:
    """Of the sum over all elements, rare ones too, towards or away from zero."""
    sums = ((samples - truth) * truth.sign()).sum(1)
    return float(sums.mean() / (sums.std() / len(samples) ** 0.5))


@pytest.mark.parametrize("spec", UNBIASED)
def test_the_expectation_is_the_mean(spec: str) -> None:
    rows = gradients(3)
    samples, truth = means(spec, rows, 400), rows.double().mean(0)
    z = z_scores(samples, truth)
    assert z.abs().max() < LARGEST_Z
    assert abs(float(z.mean())) < 5 / len(z) ** 0.5
    assert float(z.square().mean()) < 1.3
    assert abs(z_of_all(samples, truth)) < 4.5


def test_this_would_see_a_bias_of_a_tenth_of_a_step() -> None:
    rows = gradients(3)
    samples = means("maxnorm:bits=4", rows, 600)
    assert z_scores(samples, rows.double().mean(0) + 0.1 / 7 / 3).abs().max() > LARGEST_Z


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_variance_is_that_of_rounding_and_within_the_bounds(bits: int, ranks: int) -> None:
    rows, trials, s = gradients(ranks), 300, 2 ** (bits - 1) - 1
    errors = (
        (means(f"maxnorm:bits={bits},scale=bucket", rows, trials) - rows.double().mean(0)).square().sum(1)
    )
    measured, standard_error = float(errors.mean()), float(errors.std()) / trials**0.5
    # The norm is 1, which is a bfloat16.
    bound = min(NUMEL / (4 * ranks * s**2), float(rows.double().abs().sum()) / (s * ranks**2))
    assert measured <= bound + 4 * standard_error
    parts = rows.double() * s - (rows.double() * s).floor()
    exact = float((parts * (1 - parts)).sum()) / (s * ranks) ** 2
    assert abs(measured - exact) < 5 * standard_error + 1e-6 * exact


def test_several_scales_have_smaller_errors() -> None:
    rows = gradients(4)

    def error(spec: str) -> float:
        return float((means(spec, rows, 40) - rows.double().mean(0)).square().sum(1).mean())

    for scale in ("block", "tensor", "bucket"):
        one, two, three = (
            error(f"{name},scale={scale}")
            for name in ("maxnorm:bits=3", "multiscale:bits=3x6", "multiscale:bits=3x6x9")
        )
        assert two < 0.9 * one and three < 1.02 * two


def test_one_scale_a_block_is_better_than_one_for_all() -> None:
    rows = gradients(2, 16 * NUMEL)
    errors = [
        (means(f"maxnorm:bits=4,{options}", rows, 3) - rows.double().mean(0)).square().sum()
        for options in ("block=64", "block=512", "scale=bucket")
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("spec", ["maxnorm:bits=3", "multiscale:bits=3x5", "hadamard+maxnorm:bits=3"])
def test_the_error_falls_with_the_number_of_ranks(spec: str) -> None:
    """Ranks with equal gradients: were their roundings correlated, the error would not fall like 1/n."""
    one = gradients(1)
    products = []
    for ranks in (1, 4, 16, 64):
        # One scale for all: blocks depend on the lanes, and these on the ranks.
        samples = means(f"{spec},scale=bucket", one.expand(ranks, -1).clone(), 24)
        products.append(ranks * float((samples - one.double()).square().sum(1).mean()))
    np.testing.assert_allclose(products, products[0], rtol=0.1)


def test_ranks_and_steps_round_independently() -> None:
    one = gradients(1)
    lock = Lockstep(build("maxnorm:bits=2"), Segment(NUMEL, 2), True)
    rests = []
    for step in range(100):
        for residual in lock.residuals:
            residual.zero_()
        lock.reduce(one.expand(2, -1).clone(), step)
        rests.append([residual.double().clone() for residual in lock.residuals])
    first, second = (torch.stack(rest) for rest in zip(*rests, strict=True))
    pairs = {
        "ranks": (first, second),
        "steps": (first[1:], first[:-1]),
        "elements": (first[:, 1:], first[:, :-1]),
    }
    for name, (a, b) in pairs.items():
        # Each centred by its expectation, 0: the sum of products has a known spread.
        products = a * b
        z = float(products.sum() / products.square().sum().sqrt())
        assert abs(z) < 4.5, name


def test_drawn_coordinates_are_everywhere_equally_often() -> None:
    rows, trials = torch.ones(1, NUMEL), 2000
    drawn = (means("randk:ratio=0.25", rows, trials) != 0).double().mean(0)
    z = (drawn - 0.25) / (0.25 * 0.75 / trials) ** 0.5
    assert z.abs().max() < LARGEST_Z and float(z.square().mean()) < 1.2
    assert means("randk:k=7", rows, 1).count_nonzero() == 7
