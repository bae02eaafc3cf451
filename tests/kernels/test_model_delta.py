"""The passes over the buffers of an average against NumPy; `test_cuda_source` compares the GPU's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsgd.kernels.parallel import CHUNK
from hpcsgd.kernels.sums import model_delta
from tests.support.kernel_cases import DTYPES, LENGTHS, numbers

pytestmark = pytest.mark.host("a kernel of the host")

EDGES = (*LENGTHS, model_delta._HALF_CHUNK, model_delta._HALF_CHUNK + 1, CHUNK + model_delta._HALF_CHUNK + 3)
GUARD = 3.5


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def buffer(values: Tensor, shift: int = 0) -> Tensor:
    """A copy between guard elements, which must not change."""
    room = torch.full((values.numel() + shift + 5,), GUARD, dtype=values.dtype)
    part = room[1 + shift : 1 + shift + values.numel()]
    part.copy_(values)
    return part


def is_guarded(part: Tensor) -> bool:
    start = part.storage_offset()
    room = part._base
    assert room is not None
    return bool((room[:start] == GUARD).all() and (room[start + part.numel() :] == GUARD).all())


def some(numel: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    """Numbers of all magnitudes, of which no sum overflows."""
    return [buffer(numbers(numel, seed, dtype) / 8, seed) for seed in range(count)]


def wide(tensor: Tensor) -> np.ndarray:
    """In the precision in which half precisions are computed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


def same(got: Tensor, expected: np.ndarray) -> bool:
    """Whether `got` is `expected` rounded to its type, bit by bit."""
    return torch.equal(got.view(torch.uint8), torch.from_numpy(expected).to(got.dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_snapshot_is_the_model_plus_the_correction(dtype: torch.dtype) -> None:
    for numel in EDGES:
        model, correction, average, snapshot = some(numel, dtype, 4)
        before = [model.clone(), correction.clone()]
        model_delta.take_snapshot(model, correction, average, snapshot)
        assert same(snapshot, wide(model) + wide(correction)) and torch.equal(average, snapshot)
        assert torch.equal(before[0], model) and torch.equal(before[1], correction)
        assert all(map(is_guarded, (model, correction, average, snapshot)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_snapshot_without_correction_is_the_model(dtype: torch.dtype) -> None:
    model = numbers(4099, 5, dtype)
    average, snapshot = torch.empty_like(model), torch.empty_like(model)
    model_delta.take_snapshot(model, torch.zeros_like(model), average, snapshot)
    assert bool((model.view(torch.uint8) != snapshot.view(torch.uint8)).any()), "-0.0 is among the numbers"
    nonzero = model != 0
    assert same(snapshot[nonzero], wide(model[nonzero])) and not snapshot[~nonzero].signbit().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_accumulate_adds_a_share_of_average_minus_snapshot(dtype: torch.dtype, share: float) -> None:
    for numel in EDGES:
        average, snapshot, correction = some(numel, dtype, 3)
        step = wide(average) - wide(snapshot)
        expected = wide(correction) + step.dtype.type(share) * step
        before = [average.clone(), snapshot.clone()]
        squares = model_delta.accumulate(average, snapshot, correction, share)
        assert same(correction, expected), numel
        assert squares == pytest.approx(math.fsum(step.astype(np.float64) ** 2), rel=1e-13)
        assert torch.equal(before[0], average) and torch.equal(before[1], snapshot)
        assert all(map(is_guarded, (average, snapshot, correction)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_correction_adds_it_to_the_model_and_clears_it(dtype: torch.dtype) -> None:
    for numel in EDGES:
        model, correction = some(numel, dtype, 2)
        expected = wide(model) + wide(correction)
        model_delta.apply_correction(model, correction)
        assert same(model, expected) and same(correction, np.zeros(numel, np.float32))
        assert is_guarded(model) and is_guarded(correction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_of_one_changes_nothing(dtype: torch.dtype) -> None:
    model, correction, average, snapshot = (numbers(1037, 2, dtype) for _ in range(4))
    before = model.clone()
    correction.zero_()
    model_delta.take_snapshot(model, correction, average, snapshot)
    assert model_delta.accumulate(average, snapshot, correction) == 0
    model_delta.apply_correction(model, correction)
    assert torch.equal(before, model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_show_non_finite_values(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf")):
        average, snapshot, correction = torch.zeros(3, 700, dtype=dtype)
        average[600] = value
        assert not math.isfinite(model_delta.accumulate(average, snapshot, correction))
        assert not correction[600].isfinite() and torch.equal(correction[:600], snapshot[:600])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_elements(dtype: torch.dtype) -> None:
    none = [torch.empty(0, dtype=dtype) for _ in range(4)]
    model_delta.take_snapshot(*none)
    assert model_delta.accumulate(*none[1:]) == 0
    model_delta.apply_correction(*none[2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype: torch.dtype, threads: int) -> None:
    together, alone = ([numbers(4 * CHUNK + 77, seed, dtype) / 8 for seed in range(4)] for _ in range(2))

    def passes(model: Tensor, correction: Tensor, average: Tensor, snapshot: Tensor) -> float:
        squares = float(model_delta.accumulate(average, snapshot, correction))
        model_delta.take_snapshot(model, correction, average, snapshot)
        model_delta.apply_correction(model, correction)
        return squares

    squares = passes(*together)
    torch.set_num_threads(1)
    assert squares == passes(*alone) > 0
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_nothing_is_left_to_compile_after_the_warm_up() -> None:
    model_delta.warm_up(DTYPES, torch.device("cpu"))
    kernels = (model_delta._take_snapshot, model_delta._accumulate, model_delta._apply_correction)
    compiled = [list(kernel.signatures) for kernel in kernels]
    assert all(compiled)
    for dtype in DTYPES:
        model, correction, average, snapshot = some(CHUNK + 1, dtype, 4)
        model_delta.take_snapshot(model, correction, average, snapshot)
        model_delta.accumulate(average, snapshot, correction)
        model_delta.apply_correction(model, correction)
    assert compiled == [list(kernel.signatures) for kernel in kernels]
