"""The generator: uniform, and unrelated between neighbours, bits, ranks, steps and buckets."""

from __future__ import annotations

import numpy as np
import pytest

from hpcsgd.kernels.codec import spec
from hpcsgd.kernels.codec.float_bits import hash32, uniform
from hpcsgd.kernels.jit import jit

pytestmark = pytest.mark.host("the random numbers of the host's kernels")

SIZE = 1 << 20


@jit
def _fill(key0, key1, start, words, numbers):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        index = np.uint32(start + i)
        words[i] = hash32(index, key0, key1)
        numbers[i] = uniform(index, key0, key1)


def drawn(*parts: int, start: int = 0, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """The words and the numbers of [0, 1) of consecutive elements under a key of these parts."""
    words, numbers = np.empty(size, np.uint32), np.empty(size, np.float32)
    key0, key1 = map(np.uint32, spec.key(*parts))
    _fill(key0, key1, start, words, numbers)
    return words, numbers.astype(np.float64)


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from equal probabilities."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return float(((counts - expected) ** 2).sum() / expected - freedom) / (2 * freedom) ** 0.5


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """In standard deviations from none."""
    return float(np.mean((a - 0.5) * (b - 0.5)) * 12 * len(a) ** 0.5)


SEEDS = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (2**63, 7, 3)]


@pytest.mark.parametrize("parts", SEEDS)
def test_moments_and_range(parts: tuple[int, ...]) -> None:
    _, x = drawn(*parts)
    assert x.min() >= 0 and x.max() < 1
    for power in (1, 2, 3):
        variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        assert abs(np.mean(x**power) - 1 / (power + 1)) < 5 * (variance / SIZE) ** 0.5


@pytest.mark.parametrize("parts", SEEDS)
def test_bytes_pairs_and_runs_are_equally_likely(parts: tuple[int, ...]) -> None:
    words, x = drawn(*parts)
    for byte in words.view(np.uint8).reshape(-1, 4).T:
        assert abs(chi_square(np.bincount(byte, minlength=256))) < 5
    for lag in (1, 2, 16, 512):
        pairs = (x[:-lag] * 32).astype(int) * 32 + (x[lag:] * 32).astype(int)
        assert abs(chi_square(np.bincount(pairs, minlength=1024))) < 5
    ones = [(words >> bit & 1).mean() for bit in range(32)]
    assert max(abs(np.array(ones) - 0.5)) < 5 * 0.5 / SIZE**0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 31, 32, 64, 100, 128, 512, 4096, 65536])
def test_elements_are_uncorrelated(lag: int) -> None:
    _, x = drawn(5, 6)
    assert abs(correlation(x[:-lag], x[lag:])) < 5


def test_keys_that_differ_in_one_part_are_unrelated() -> None:
    """Ranks, steps, buckets, seeds: whatever the parts are, neighbours share nothing."""
    size = 1 << 16
    base = (3, 4, 5)
    keys = [base]
    for place in range(3):
        for change in (1, 2, 3, 255, 2**31, 2**32, 2**40):
            keys.append(tuple(part + change * (place == k) for k, part in enumerate(base)))
    x = np.stack([drawn(*parts, size=size)[1] for parts in keys])
    both = (x - 0.5) @ (x - 0.5).T * 12 / size**0.5
    assert np.abs(both[~np.eye(len(keys), dtype=bool)]).max() < 5
    assert len({spec.key(*parts) for parts in keys}) == len(keys)
    mean = x.mean(0)
    assert np.var(mean) == pytest.approx(1 / 12 / len(keys), rel=0.05)


def test_parts_do_not_run_together() -> None:
    assert len({spec.key(1, 0), spec.key(0, 1), spec.key(1), spec.key(0, 0, 1), spec.key(1, 0, 0)}) == 5


def test_every_bit_of_an_index_changes_half_of_the_bits() -> None:
    size = 1 << 14
    words, _ = drawn(1, 2, size=size)
    for bit in range(32):
        if 1 << bit < size:
            changed = words ^ words[np.arange(size) ^ (1 << bit)]
        else:
            changed = words ^ drawn(1, 2, start=1 << bit, size=size)[0]
        assert abs(np.bitwise_count(changed).mean() - 16) < 1, bit


def test_every_bit_of_a_part_changes_half_of_the_bits() -> None:
    size = 1 << 12
    words, _ = drawn(1, 2, size=size)
    for bit in range(63):
        for parts in ((1 ^ 1 << bit, 2), (1, 2 ^ 1 << bit)):
            assert abs(np.bitwise_count(words ^ drawn(*parts, size=size)[0]).mean() - 16) < 0.5, (bit, parts)


def test_the_index_wraps_at_32_bits() -> None:
    words, _ = drawn(9, start=2**32 - 2, size=4)
    assert list(words[2:]) == list(drawn(9, size=2)[0])
