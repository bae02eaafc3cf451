"""The sums over rows against NumPy, for any length, offset and number of rows."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.kernels.sums import node_reduce
from hpcsgd.kernels.sync import barrier

pytestmark = pytest.mark.host("a kernel of the host")

DTYPES = (np.float32, np.float64)
EDGES = st.sampled_from([0, 1, 15, 16, 1023, 1024, 1025, 2048, 2049]) | st.integers(0, 5000)


def rows_of(ranks: int, numel: int, dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, numel]).standard_normal((ranks, numel)).astype(dtype)


def scaled_sum(rows: np.ndarray, scale: float) -> np.ndarray:
    """The result that the kernels guarantee bit for bit: in rank order, in the rows' own precision."""
    total = rows[0] + rows[1]
    for row in rows[2:]:
        total += row
    return total * rows.dtype.type(scale)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    EDGES,
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from(DTYPES),
    st.sampled_from([1.0, 0.5, 1 / 3]),
    st.data(),
)
def test_a_part_is_reduced_and_nothing_else_is_touched(
    ranks: int, size: int, start: int, after: int, dtype: type, scale: float, data: st.DataObject
) -> None:
    stop = start + size
    rows = rows_of(ranks, stop + after, dtype)
    total = scaled_sum(rows, scale)
    me = data.draw(st.integers(0, ranks - 1))
    one, every = rows.copy(), rows.copy()
    node_reduce.reduce_part(one, start, stop, dtype(scale), me)
    node_reduce.reduce_part_to_all(every, start, stop, dtype(scale))
    for rank in range(ranks):
        expected = rows[rank].copy()
        if rank == me:
            expected[start:stop] = total[start:stop]
        np.testing.assert_array_equal(one[rank], expected)
        expected[start:stop] = total[start:stop]
        np.testing.assert_array_equal(every[rank], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_and_infinity_pass_through(dtype: type) -> None:
    rows = np.array([[1, np.inf, np.nan, np.inf], [2, 1, 1, -np.inf]], dtype)
    node_reduce.reduce_part_to_all(rows, 0, 4, dtype(1))
    expected = np.array([3, np.inf, np.nan, np.nan], dtype)
    np.testing.assert_array_equal(rows, np.stack([expected, expected]))


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_as_ranks_reduce_to_the_same_bits(ranks: int, dtype: type) -> None:
    flags = np.zeros(barrier.flags_size(ranks) // 4, np.int32)
    numel, rounds = 3000, 20
    rows = rows_of(ranks, numel, dtype)
    expected = rows.copy()
    for _ in range(rounds):
        expected[:] = scaled_sum(expected, 0.5)
    cuts = np.linspace(0, numel, ranks + 1).astype(int)

    def rank_of(me: int) -> None:
        for _ in range(rounds):
            phase = target = 0
            while phase != node_reduce.DONE:
                phase, target = node_reduce.allreduce(
                    phase, target, flags, rows, cuts[me], cuts[me + 1], dtype(0.5), me, 10, 1000
                )

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(rows, expected)


def test_an_allreduce_that_lacks_a_rank_comes_back_to_its_caller() -> None:
    flags = np.zeros(barrier.flags_size(2) // 4, np.int32)
    rows = rows_of(2, 10, np.float32)
    before = rows.copy()
    phase = target = 0
    for _ in range(3):
        phase, target = node_reduce.allreduce(phase, target, flags, rows, 0, 10, np.float32(1), 0, 5, 1000)
        assert phase == node_reduce.WAIT_ALL_READY and barrier.missing_ranks(flags, 2, target) == [1]
    np.testing.assert_array_equal(rows, before)
