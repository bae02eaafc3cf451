"""Coordinates drawn without replacement: one in each interval, all equally likely, at any length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsgd.kernels.codec import host, sample, spec
from tests.support.kernel_cases import DTYPES, finish

pytestmark = pytest.mark.host("a kernel of the host")


def sampled(x: Tensor, count: int, seed: int = 0) -> Tensor:
    out = torch.full((count,), float("nan"))
    finish(host.take_sample(x, spec.key(seed), out))
    return out


sizes = st.integers(1, 3000).flatmap(lambda numel: st.tuples(st.just(numel), st.integers(0, numel)))


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(0, 100))
def test_one_coordinate_of_each_interval(size: tuple[int, int], seed: int) -> None:
    numel, count = size
    at = sampled(torch.arange(numel), count, seed).long().tolist()
    for i, index in enumerate(at):
        assert i * numel // count <= index < (i + 1) * numel // count


@settings(max_examples=60, deadline=None)
@given(sizes, st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.integers(0, 3))
def test_put_sample_writes_what_take_sample_read(
    size: tuple[int, int], dtype: torch.dtype, by_length: bool, clear: bool, shift: int
) -> None:
    numel, count = size
    x = torch.randn(numel + shift, generator=torch.Generator().manual_seed(numel)).to(dtype)[shift:]
    at = sampled(torch.arange(numel), count).long()
    values = sampled(x, count)
    assert torch.equal(values, x[at].float())
    out = torch.full_like(x, 7)
    finish(host.put_sample(values, spec.key(0), by_length, clear, out))
    expected = torch.full_like(x, 0 if clear else 7)
    length = [(i + 1) * numel // count - i * numel // count for i in range(count)]
    expected[at] = (values * torch.tensor(length) if by_length else values).to(dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("numel", "count"), [(12, 3), (100, 7), (1000, 999)])
def test_all_elements_of_an_interval_are_equally_likely(numel: int, count: int) -> None:
    rounds, hits = 20_000, torch.zeros(numel, dtype=torch.float64)
    x = torch.arange(numel)
    for seed in range(rounds // count):
        hits[sampled(x, count, seed).long()] += 1
    per_interval = rounds // count
    chi_square = 0.0
    for i in range(count):
        interval = hits[i * numel // count : (i + 1) * numel // count]
        chi_square += float(
            ((interval - per_interval / len(interval)) ** 2).sum() / (per_interval / len(interval))
        )
    freedom = numel - count
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_by_length_the_sample_has_no_bias() -> None:
    x = torch.randn(101, generator=torch.Generator().manual_seed(0))
    mean, rounds, count = torch.zeros(101, dtype=torch.float64), 20_000, 13
    for seed in range(rounds):
        out = torch.empty(101)
        finish(host.put_sample(sampled(x, count, seed), spec.key(seed), True, True, out))
        mean += out / rounds
    # Of a interval of at most 8 elements, the variance is at most 7 times the square.
    assert bool(((mean - x).abs() <= 5 * x.abs() * (7 / rounds) ** 0.5).all())


def test_indices_beyond_32_bits() -> None:
    numel, count = 2**40 + 7, 2**20
    indices, lengths = torch.empty(count, dtype=torch.int64), torch.empty(count)
    key0, key1 = map(np.uint32, spec.key(5))
    sample.coordinates(numel, count, key0, key1, 0, count, indices.numpy(), lengths.numpy())
    starts = torch.tensor([i * numel // count for i in range(count + 1)])
    assert bool(((indices >= starts[:-1]) & (indices < starts[1:])).all())
    position = (indices - starts[:-1]).double() / 2**20
    assert abs(float(position.mean()) - 0.5) < 0.002 and float(position.max()) > 0.999


def test_chunks_change_nothing() -> None:
    x = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    at = sampled(torch.arange(len(x)), 150_000).long()
    values = sampled(x, 150_000)
    assert torch.equal(values, x[at])
    for clear in (True, False):
        out = torch.full_like(x, 3.0)
        finish(host.put_sample(values, spec.key(0), False, clear, out))
        expected = torch.full_like(x, 0.0 if clear else 3.0)
        expected[at] = values
        assert torch.equal(out, expected)
