"""The random rotation: against a Hadamard matrix, its inverse, its norm, and its purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsgd.kernels.codec import host, spec
from tests.support.kernel_cases import LENGTHS, finish

pytestmark = pytest.mark.host("a kernel of the host")

KEY = spec.key(11)
EDGES = (0, *LENGTHS, 16383, 16384, 16385, 40001, 3 * 16384 + 31)


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def rotated(x: Tensor, key: tuple[int, int] = KEY, offset: int = 0) -> Tensor:
    out = torch.full((x.numel(),), float("nan"))
    finish(host.rotate(x, key, offset, out))
    return out


def unrotated(x: Tensor, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    out = torch.full((x.numel(),), float("nan"), dtype=dtype)
    finish(host.unrotate(x, KEY, offset, out))
    return out


def signs(start: int, numel: int) -> np.ndarray:
    """Signs of the hash, as specified in `spec`."""
    h = (np.arange(start, start + numel).astype(np.uint32) ^ np.uint32(KEY[0])) * np.uint32(spec.HASH_A)
    h = ((h ^ (h >> 16)) + np.uint32(KEY[1])) * np.uint32(spec.HASH_B)
    h = (h ^ (h >> 15)) * np.uint32(spec.HASH_C)
    return np.where((h ^ (h >> 15)) >> 31, -1.0, 1.0)


def hadamard(rows: int) -> np.ndarray:
    r = np.arange(rows)
    return np.where(np.bitwise_count(r[:, None] & r) % 2, -1.0, 1.0) / np.sqrt(rows)


@pytest.mark.parametrize("numel", EDGES)
def test_signs_then_a_hadamard_matrix_along_the_rows_of_each_tile(numel: int) -> None:
    x, offset = normal(numel), 12345
    expected, begin = x.double().numpy() * signs(offset, numel), 0
    while numel - begin >= 32:
        rows = min(1024, 2 ** ((numel - begin) // 16).bit_length() // 2)
        tile = expected[begin : begin + 16 * rows].reshape(rows, 16)
        tile[:] = hadamard(rows) @ tile
        begin += 16 * rows
    np.testing.assert_allclose(rotated(x, offset=offset).numpy(), expected, atol=2e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(EDGES) | st.integers(0, 40_000),
    st.integers(0, 2**33),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    st.integers(0, 3),
)
def test_unrotate_undoes_it_and_the_norm_stays(
    numel: int, offset: int, dtype: torch.dtype, shift: int
) -> None:
    x = normal(numel + shift).to(dtype)[shift:]
    there = rotated(x, offset=offset)
    assert float(there.double().norm()) == pytest.approx(float(x.double().norm()), rel=1e-6)
    precision = max(torch.finfo(dtype).eps, 2e-7)
    torch.testing.assert_close(unrotated(there, dtype, offset), x, rtol=precision, atol=5e-6)


def test_in_place_gives_the_same() -> None:
    x = normal(50_001)
    expected, values = rotated(x), x.clone()
    finish(host.rotate(values, KEY, 0, values))
    assert torch.equal(values, expected)
    back = unrotated(values)
    finish(host.unrotate(values, KEY, 0, values))
    assert torch.equal(values, back)


def test_a_sum_stays_a_sum() -> None:
    x, y = normal(20_000, 1), normal(20_000, 2)
    torch.testing.assert_close(rotated(x) + rotated(y), rotated(x + y), rtol=0, atol=3e-6)


def test_tiles_are_independent_of_later_elements() -> None:
    """Chunks, threads and the length behind a tile change none of its bits."""
    x = normal(300_000)
    assert torch.equal(rotated(x)[:16384], rotated(x[:16384]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rotated(x), rotated(x.clone()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(rotated(x)[16384:32768], rotated(x[16384:32768], offset=16384))


def test_one_large_element_is_spread_over_its_tile() -> None:
    x = torch.zeros(16384)
    x[5000] = 1024.0
    spread = rotated(x)
    assert spread.abs().max() == 32.0 and int((spread != 0).sum()) == 1024


def test_another_key_is_another_rotation() -> None:
    x = normal(16384)
    alike = torch.nn.functional.cosine_similarity(rotated(x), rotated(x, spec.key(12)), dim=0)
    assert abs(float(alike)) < 0.04


def test_large_and_tiny_numbers() -> None:
    for value in (1e37, 1e-30):
        x = normal(16384) * value
        torch.testing.assert_close(unrotated(rotated(x)), x, rtol=1e-6, atol=value * 1e-6)
    tiny = torch.full((16384,), 1e-42)
    assert float((unrotated(rotated(tiny)) - tiny).abs().max()) < 3e-43
    assert not rotated(torch.zeros(1000)).any()
