"""The passes over the buffers of an average against NumPy; `test_cuda_source` compares the GPU's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsgd.kernels.parallel import PIECE
from hpcsgd.kernels.sums import model_delta
from tests.support.kernel_cases import DTYPES, LENGTHS, numbers

EDGES = (*LENGTHS, model_delta._CHUNK, model_delta._CHUNK + 1, PIECE + model_delta._CHUNK + 3)
GUARD = 3.5


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def buffer(values: Tensor, shift: int = 0) -> Tensor:
    """A copy between elements that nobody may touch."""
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
    """What half precisions are computed in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


def same(got: Tensor, expected: np.ndarray) -> bool:
    """Whether `got` is `expected` rounded to its type, bit by bit."""
    return torch.equal(got.view(torch.uint8), torch.from_numpy(expected).to(got.dtype).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_snapshot_is_the_model_with_what_it_gained(dtype: torch.dtype) -> None:
    for numel in EDGES:
        model, gain, average, shot = some(numel, dtype, 4)
        before = [model.clone(), gain.clone()]
        model_delta.snapshot(model, gain, average, shot)
        assert same(shot, wide(model) + wide(gain)) and torch.equal(average, shot)
        assert torch.equal(before[0], model) and torch.equal(before[1], gain)
        assert all(map(is_guarded, (model, gain, average, shot)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_snapshot_without_gain_is_the_model(dtype: torch.dtype) -> None:
    model = numbers(4099, 5, dtype)
    average, shot = torch.empty_like(model), torch.empty_like(model)
    model_delta.snapshot(model, torch.zeros_like(model), average, shot)
    assert bool((model.view(torch.uint8) != shot.view(torch.uint8)).any()), "-0.0 is among the numbers"
    nonzero = model != 0
    assert same(shot[nonzero], wide(model[nonzero])) and not shot[~nonzero].signbit().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_gain_advances_by_a_share_of_what_the_average_brings(dtype: torch.dtype, share: float) -> None:
    for numel in EDGES:
        average, shot, gain = some(numel, dtype, 3)
        step = wide(average) - wide(shot)
        expected = wide(gain) + step.dtype.type(share) * step
        before = [average.clone(), shot.clone()]
        squares = model_delta.advance(average, shot, gain, share)
        assert same(gain, expected), numel
        assert squares == pytest.approx(math.fsum(step.astype(np.float64) ** 2), rel=1e-13)
        assert torch.equal(before[0], average) and torch.equal(before[1], shot)
        assert all(map(is_guarded, (average, shot, gain)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_moves_the_gain_into_the_model(dtype: torch.dtype) -> None:
    for numel in EDGES:
        model, gain = some(numel, dtype, 2)
        expected = wide(model) + wide(gain)
        model_delta.merge(model, gain)
        assert same(model, expected) and same(gain, np.zeros(numel, np.float32))
        assert is_guarded(model) and is_guarded(gain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_of_one_changes_nothing(dtype: torch.dtype) -> None:
    model, gain, average, shot = (numbers(1037, 2, dtype) for _ in range(4))
    before = model.clone()
    gain.zero_()
    model_delta.snapshot(model, gain, average, shot)
    assert model_delta.advance(average, shot, gain) == 0
    model_delta.merge(model, gain)
    assert torch.equal(before, model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen_in_the_squares(dtype: torch.dtype) -> None:
    for value in (float("nan"), float("inf")):
        average, shot, gain = torch.zeros(3, 700, dtype=dtype)
        average[600] = value
        assert not math.isfinite(model_delta.advance(average, shot, gain))
        assert not gain[600].isfinite() and torch.equal(gain[:600], shot[:600])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_elements(dtype: torch.dtype) -> None:
    none = [torch.empty(0, dtype=dtype) for _ in range(4)]
    model_delta.snapshot(*none)
    assert model_delta.advance(*none[1:]) == 0
    model_delta.merge(*none[2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype: torch.dtype, threads: int) -> None:
    together, alone = ([numbers(4 * PIECE + 77, seed, dtype) / 8 for seed in range(4)] for _ in range(2))

    def passes(model: Tensor, gain: Tensor, average: Tensor, shot: Tensor) -> float:
        squares = float(model_delta.advance(average, shot, gain))
        model_delta.snapshot(model, gain, average, shot)
        model_delta.merge(model, gain)
        return squares

    squares = passes(*together)
    torch.set_num_threads(1)
    assert squares == passes(*alone) > 0
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_nothing_is_left_to_compile_after_the_warm_up() -> None:
    model_delta.warm_up(DTYPES, torch.device("cpu"))
    kernels = (model_delta._snapshot, model_delta._advance, model_delta._merge)
    compiled = [list(kernel.signatures) for kernel in kernels]
    assert all(compiled)
    for dtype in DTYPES:
        model, gain, average, shot = some(PIECE + 1, dtype, 4)
        model_delta.snapshot(model, gain, average, shot)
        model_delta.advance(average, shot, gain)
        model_delta.merge(model, gain)
    assert compiled == [list(kernel.signatures) for kernel in kernels]
