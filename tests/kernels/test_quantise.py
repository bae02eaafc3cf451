"""The host's codes against NumPy code written from `spec` alone, and the properties of codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.kernels.codec import host, spec
from tests.support.kernel_cases import LENGTHS, CodecCase, finish, make_case, numbers, residuals_for, run_case

pytestmark = pytest.mark.host("a kernel of the host")

F = np.float32
PLANS = [((2,), 1), ((3,), 2), ((4,), 4), ((8,), 2), ((11,), 64), ((16,), 3), ((4, 8), 4), ((2, 6, 12), 3)]


def random(index: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    h = (index.astype(np.uint32) ^ np.uint32(key[0])) * np.uint32(spec.HASH_A)
    h ^= h >> 16
    h = (h + np.uint32(key[1])) * np.uint32(spec.HASH_B)
    h ^= h >> 15
    h *= np.uint32(spec.HASH_C)
    h ^= h >> 15
    return ((h >> 8).astype(np.float64) / 2**24).astype(F)


def float_of(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint32).view(F)


def norm_of(values: np.ndarray, euclidean: bool) -> int:
    largest = np.abs(values).max()
    if euclidean:
        sums = np.zeros(128)
        for j, v in enumerate(values.astype(np.float64)):
            sums[j % 128] += v * v
        for h in (64, 32, 16, 8, 4, 2, 1):
            sums[:h] += sums[h : 2 * h]
        largest = max(largest, F(min(np.sqrt(sums[0]), float(float_of(np.array(0x7F7F0000))))))
    return min((int(F(largest).view(np.uint32)) + 0xFFFF) >> 16, 0x7F7F)


@dataclass
class Reference:
    """Norm, scale, code and quantisation error of each element."""

    norms: np.ndarray
    masks: np.ndarray
    words: list[int]
    residual: np.ndarray
    decoded: np.ndarray


def reference(c: CodecCase) -> Reference:
    tiling, lanes, levels = c.tiling, c.lanes, c.levels.numpy()
    total = c.x.float().numpy() + (F(0) if c.residual is None else c.residual.numpy())
    i = np.arange(tiling.numel)
    row, j = i // tiling.row, i % tiling.row
    norms = np.array([norm_of(total[row == r], c.euclidean) for r in range(tiling.rows)])
    exponent = np.clip(254 - (norms >> 7), 1, 253)
    pre, post = float_of(exponent << 23)[row], float_of((254 - exponent) << 23)[row]
    base = float_of(norms << 16)[row] * pre

    def inverse(k: int) -> np.ndarray:
        return np.where(base > 0, levels[k] / np.where(base > 0, base, F(1)), F(0))

    masks = np.zeros((len(levels) - 1, -(-tiling.rows // 32), tiling.row), np.uint64)
    inverses = inverse(0)
    for k in range(1, len(levels)):
        fits = np.abs(total * pre * inverse(k)) <= levels[0]
        np.add.at(masks[k - 1], (row // 32, j), fits.astype(np.uint64) << (row % 32).astype(np.uint64))
        inverses = np.where(fits, inverse(k), inverses)
    y = total * pre * inverses
    low = np.floor(y)
    codes = np.clip(low + (random(c.offset + i, c.key) < y - low), -levels[0], levels[0]).astype(F)
    words = [0] * tiling.words
    for element in range(tiling.numel):
        tile, lane = divmod(int(row[element]), lanes.count)
        words[tile * tiling.row + int(j[element])] += int(codes[element] + levels[0]) << (lane * lanes.width)
    positive = inverses > 0
    steps = np.where(positive, inverses, F(1))
    unit, scaled = np.where(positive, F(1) / steps, F(0)), np.where(positive, F(1 / c.terms) / steps, F(0))
    # The words hold one rank's codes; the others' biases are not in them.
    sums = (codes.astype(int) - int(levels[0]) * (c.terms - 1)).astype(F)
    return Reference(norms, masks, words, total - codes * unit * post, sums * scaled * post)


def unsigned(words: torch.Tensor) -> list[int]:
    return [int(word) for word in words.numpy().view(f"u{words.element_size()}")]


def check(c: CodecCase) -> None:
    expected = reference(c)
    run_case(c)
    np.testing.assert_array_equal(c.norms.numpy(), expected.norms)
    np.testing.assert_array_equal(c.masks.numpy().view(np.uint32).ravel(), expected.masks.ravel())
    assert unsigned(c.words) == expected.words
    np.testing.assert_array_equal(c.out.numpy().view(np.uint32), expected.decoded.view(np.uint32))
    if c.residual is not None:
        np.testing.assert_array_equal(c.residual.numpy(), expected.residual)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("feedback", [False, True])
def test_the_same_bits_as_numpy(plan: tuple[tuple[int, ...], int], feedback: bool) -> None:
    for index, numel in enumerate(LENGTHS):
        memory = numbers(numel + index % 3, index)
        residual = residuals_for(numel, index) if feedback else None
        check(
            make_case(memory[index % 3 :], residual, *plan, (16, 100, 512)[index % 3], index % 2 == 0, index)
        )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=200),
    st.integers(2, 16),
    st.integers(1, 64),
    st.integers(16, 64),
    st.booleans(),
)
def test_the_same_bits_as_numpy_for_any_numbers(
    values: list[float], bits: int, terms: int, row: int, euclidean: bool
) -> None:
    check(make_case(torch.tensor(values), None, (bits,), terms, row, euclidean))


@pytest.mark.parametrize("plan", PLANS)
def test_the_error_is_at_most_a_step_and_equals_the_residual(plan: tuple[tuple[int, ...], int]) -> None:
    bits, _ = plan
    x, before = numbers(4099), residuals_for(4099)
    c = run_case(make_case(x, before.clone(), bits, 1, 64))
    total = (x + before).double()
    row = torch.arange(4099) // c.tiling.row
    norm = (c.norms.view(torch.int16).int() << 16).view(torch.float32).double()[row]
    rounding = norm * 2.0**-22 + 3e-45
    # A norm is never above the largest bfloat16, a float32 may be.
    beyond = (total.abs() - norm).clamp(min=0)
    assert bool(((c.out.double() - total).abs() <= norm / c.levels[0] + rounding + beyond).all())
    assert c.residual is not None
    assert bool(((c.out.double() + c.residual - total).abs() <= rounding).all())


def lanes_of(words: list[int], lanes: spec.Lanes) -> np.ndarray:
    shifts = [lane * lanes.width for lane in range(lanes.count)]
    return np.array([[(word >> shift) % 2**lanes.width for shift in shifts] for word in words])


@pytest.mark.parametrize(("bits", "ranks"), [(2, 2), (4, 4), (3, 21), (8, 64), (16, 5), (11, 64)])
def test_words_of_all_ranks_can_be_added(bits: int, ranks: int) -> None:
    """At the extremes too: all ranks send the highest or the lowest code in every lane."""
    for kind in (torch.ones(1037), -torch.ones(1037), None):
        each = []
        for rank in range(ranks):
            x = numbers(1037, rank) if kind is None else kind
            each.append(run_case(make_case(x, None, (bits,), ranks, 100, seed=rank)))
        total = torch.stack([c.words for c in each]).sum(0).to(each[0].words.dtype)
        expected = sum(lanes_of(unsigned(c.words), c.lanes) for c in each)
        np.testing.assert_array_equal(lanes_of(unsigned(total), each[0].lanes), expected)


def test_rounding_has_no_bias() -> None:
    x = torch.linspace(-1, 1, 64).repeat(16)
    mean, rounds = torch.zeros(len(x), dtype=torch.float64), 3000
    for seed in range(rounds):
        c = run_case(make_case(x, None, (2,), 1, 1000, seed=seed))
        mean += c.out / rounds
    assert bool((c.norms == c.norms[0]).all()), "one for all rows"
    # Of one level and a norm of 1, the variance of a code is |x| (1 - |x|).
    z = (mean - x)[x.abs() < 0.99] / (x.abs() * (1 - x.abs())).sqrt()[x.abs() < 0.99] * rounds**0.5
    assert float(z.abs().max()) < 5 and 0.85 < float(z.square().mean()) < 1.15


def test_one_element_and_none() -> None:
    for bits in ((4,), (4, 8)):
        one = run_case(make_case(torch.tensor([0.3]), None, bits, 1, 512))
        assert abs(float(one.out) - 0.3) < 0.1
        assert run_case(make_case(torch.empty(0), None, bits, 1, 512)).words.numel() == 0


def test_zeros_stay_zeros_with_feedback() -> None:
    c = run_case(make_case(torch.zeros(1000), torch.zeros(1000), (4, 8), 1, 100))
    assert not c.out.any() and c.residual is not None and not c.residual.any()


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("euclidean", [False, True])
def test_only_the_norm_of_a_non_finite_row_is_non_finite(value: float, euclidean: bool) -> None:
    x = torch.full((1000,), 3.4e38)
    x[345] = value
    c = make_case(x, None, (4,), 1, 50, euclidean)
    finish(host.norms(x, None, c.tiling, euclidean, c.norms))
    broken = c.norms.view(torch.int16) >= spec.NOT_FINITE
    assert broken.nonzero().ravel().tolist() == [345 // c.tiling.row]


def test_threads_and_chunks_change_nothing() -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run_case(make_case(x, x * 0.1, (4, 8), 4, 512)))
    finally:
        torch.set_num_threads(before)
    one, three = results
    for name in ("norms", "masks", "words", "out", "residual"):
        assert torch.equal(getattr(one, name).view(torch.uint8), getattr(three, name).view(torch.uint8))
