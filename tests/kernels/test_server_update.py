"""The server's kernels against NumPy: the same bits, for the order of the sums is that of the pushes."""

from __future__ import annotations

import numpy as np
import pytest

from hpcsgd.kernels.sums.server_update import _BLOCK, elastic_update, sum_pushes

pytestmark = pytest.mark.host("a kernel of the host")

SIZES = (0, 1, 7, _BLOCK - 1, _BLOCK, _BLOCK + 1, 3 * _BLOCK + 5)
DTYPES = (np.float32, np.float64)


def drawn(count: int, size: int, dtype: type) -> list[np.ndarray]:
    draw = np.random.default_rng(count * 10_000 + size)
    return [draw.standard_normal(size).astype(dtype) for _ in range(count)]


def addresses(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays], np.int64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_sum_is_made_in_order(dtype: type, size: int, count: int) -> None:
    before = drawn(count, size, dtype)
    scale = dtype(1 / count)
    wanted = before[0].copy()
    for push in before[1:]:
        wanted += push
    wanted *= scale
    for place in (0, count - 1, None):
        pushes = [push.copy() for push in before]
        out = np.full(size, np.nan, dtype) if place is None else pushes[place]
        sum_pushes(out, addresses(pushes), scale)
        np.testing.assert_array_equal(out, wanted)
        for push, old in zip(pushes, before, strict=True):
            assert push is out or np.array_equal(push, old)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_elastic_updates_use_the_centre_before_the_update(dtype: type, size: int, count: int) -> None:
    centre, *pushes = drawn(count + 1, size, dtype)
    before, models = centre.copy(), [push.copy() for push in pushes]
    alpha = dtype(0.3)
    elastic_update(centre, addresses(pushes), alpha)
    wanted = before.copy()
    for push, model in zip(pushes, models, strict=True):
        force = alpha * (model - before)
        np.testing.assert_array_equal(push, force)
        wanted += force
    np.testing.assert_array_equal(centre, wanted)


def test_a_non_finite_value_affects_only_its_element() -> None:
    centre, push = np.zeros(5, np.float32), np.array([1, np.nan, 1, np.inf, 1], np.float32)
    elastic_update(centre, addresses([push]), np.float32(0.5))
    np.testing.assert_array_equal(centre, np.array([0.5, np.nan, 0.5, np.inf, 0.5], np.float32))
