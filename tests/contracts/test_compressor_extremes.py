"""Every compression scheme at the ends of float32: zeros, denormals, the largest numbers, and beyond."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsgd.compress import build
from hpcsgd.compress.base import RandomKey, all_finite
from tests.support import compressor_rows as c
from tests.support.compression_invariants import lockstep, reduce_and_check, segment_of
from tests.support.devices import fewer, on_device
from tests.support.simulated_codecs import NotFinite, buffers_of

each_row = pytest.mark.parametrize("row", c.ROWS, ids=str)
MAX, TINY = float(np.finfo(np.float32).max), 2.0**-149


def extremes(ranks: int) -> Iterator[tuple[str, Tensor]]:
    """Finite numbers at the ends of float32, of each rank."""
    rng = np.random.default_rng(3)
    ladder = 2.0 ** rng.integers(-149, 127, 1500) * rng.choice([-1, 1], 1500)
    kinds = {
        "zeros": np.zeros(700),
        "minus zeros": np.full(700, -0.0),
        "one": np.array([3.25]),
        "one zero": np.zeros(1),
        "one denormal": np.array([TINY]),
        "one largest": np.array([-MAX]),
        "denormals": np.arange(-300, 300) * TINY,
        "1e38": np.full(600, 1e38),
        "largest": np.resize([MAX, -MAX, -MAX], 600),
        "a largest one": np.eye(1, 900, 444)[0] * MAX,
        "all magnitudes": ladder,
        "zeros, then numbers": np.concatenate([np.zeros(1024), np.linspace(-1, 1, 700)]),
    }
    for name, x in kinds.items():
        yield name, on_device(torch.from_numpy(x).float()).expand(ranks, -1).clone()
        if ranks > 1:
            others = torch.zeros(ranks, x.size)
            others[ranks - 1] = torch.from_numpy(x)
            yield f"{name} on one rank", others


@each_row
@pytest.mark.parametrize("ranks", [1, 4])
def test_extreme_numbers(row: c.Row, ranks: int) -> None:
    for name, rows in extremes(ranks):
        if row.mixes and not row.rotated:
            rows /= 2  # products of factors are rounded, and may come out above the largest number
        lock = lockstep(row, segment_of(rows.shape[1], ranks), True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                residuals = reduce_and_check(row, lock, rows, 0)
            except NotFinite:
                # A rotation may add up more than a float32 can hold.
                assert row.rotated and rows.double().norm(dim=1).max() > MAX, name
                continue
        if not rows.any():
            assert not residuals.any() and not lock.reduce(rows).any(), name


@pytest.mark.parametrize("numel", [0, 1])
@each_row
def test_nothing_and_a_single_element(row: c.Row, numel: int) -> None:
    for ranks in (1, 2, fewer(64)):
        lock = lockstep(row, segment_of(numel, ranks), True)
        for step in range(2):
            reduce_and_check(row, lock, torch.full((ranks, numel), -1.5), step)


@each_row
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stop_at_the_first_message(row: c.Row, bad: float) -> None:
    for where in (0, 2500, 4999):
        values = torch.ones(5000)
        values[where] = bad
        check_that_it_stops(row, values, torch.ones(5000))


@pytest.mark.parametrize("row", [row for row in c.ROWS if not row.rotated], ids=str)
def test_an_overflow_with_the_residual_stops_at_the_first_message(row: c.Row) -> None:
    values = torch.ones(5000)
    values[1234] = 3e38
    check_that_it_stops(row, values, values.clone())


def check_that_it_stops(row: c.Row, values: Tensor, residual: Tensor) -> None:
    """The first message shows it, and nothing is changed before."""
    compressor = build(row.spec)
    assert compressor is not None
    codec = compressor.codec(segment_of(values.numel(), 1))
    before = values.clone(), residual.clone()
    run = codec.run(values, buffers_of(codec, values.device), RandomKey(0, 0, 0, 0), 1.0, residual)
    first = next(message for message in run if message is not None)
    assert first.op == "max" and not all_finite(first.data)
    for now, then in zip((values, residual), before, strict=True):
        assert torch.equal(now.view(torch.int32), then.view(torch.int32))
