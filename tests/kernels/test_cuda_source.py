"""The GPU's kernels give the host's bits: their source run on this CPU, and, where there is one, on a GPU."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from copy import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.kernels import cuda_loader
from hpcsgd.kernels.codec import device, host, spec
from hpcsgd.kernels.sums import device_sums, model_delta
from hpcsgd.tensors.weighted_sum import weighted_sum
from tests.support import nvrtc
from tests.support.kernel_cases import (
    DTYPES,
    LENGTHS,
    CodecCase,
    finish,
    make_case,
    numbers,
    residuals_for,
    run_case,
)

# Its fixture compiles all kernels, twice.
pytestmark = [pytest.mark.together, pytest.mark.timeout(180)]
KEY = spec.key(3, 1)
FILES = ["codec/quantise", "codec/hadamard", "codec/sample", "sums/model_delta", "sums/device_sums"]
#: Bits of each scale, and terms.
PLANS = [((4,), 4), ((2,), 1), ((3,), 40), ((8,), 64), ((16,), 3), ((4, 8), 4), ((2, 5, 9), 3)]


def _has_gpu() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None


@pytest.fixture(scope="session")
def launcher() -> Any:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the kernels for the CPU with")
    from tests.support.cuda_on_cpu import Launcher

    return Launcher()


@pytest.fixture(autouse=True)
def host_tensors() -> Iterator[None]:
    """Inputs and expected results are those of the host, whatever the device of models."""
    with torch.device("cpu"):
        yield


@pytest.fixture(params=["g++", "gpu", "standin"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device whose tensors `hpcsgd.kernels.codec.device` works on."""
    if (request.param == "standin") != (request.config.getoption("--device") == "standin"):
        pytest.skip("the stand-in is tested with --device standin, which tests nothing else")
    if request.param == "gpu":
        if not _has_gpu():
            pytest.skip("no GPU with CuPy here")
        yield torch.device("cuda", 0)
    elif request.param == "standin":
        yield torch.device("standin", 0)
    else:
        monkeypatch.setattr(cuda_loader, "launch", request.getfixturevalue("launcher"))
        monkeypatch.setattr(cuda_loader, "multiprocessors", lambda _: 1)
        monkeypatch.setattr(cuda_loader, "_BLOCKS_PER_MULTIPROCESSOR", 3)
        yield torch.device("cpu")


def there(tensor: Tensor, where: torch.device, shift: int = 0) -> Tensor:
    """A copy on the device, `shift` elements after an address of large alignment."""
    room = torch.empty(tensor.numel() + shift + 16, dtype=tensor.dtype, device=where)
    shift += -(room.data_ptr() // tensor.element_size()) % 16
    part = room[shift : shift + tensor.numel()].view(tensor.shape)
    part.copy_(tensor)
    return part


def bits(tensor: Tensor) -> Tensor:
    """As bytes, so that NaN equals itself, and -0.0 is not 0.0."""
    return tensor.cpu().view(torch.uint8)


def same(host_result: Tensor, device_result: Tensor) -> bool:
    return torch.equal(bits(host_result), bits(device_result))


def one_nan(tensor: Tensor) -> Tensor:
    """With the same NaN for all, whose sign and payload differ between processors."""
    return tensor.masked_fill(tensor.isnan(), float("nan"))


def moved(c: CodecCase, where: torch.device, shift: int) -> CodecCase:
    moved = copy(c)
    for field in fields(c):
        value = getattr(c, field.name)
        if isinstance(value, Tensor):
            setattr(moved, field.name, there(value, where, shift if field.name in ("x", "out") else 0))
    return moved


def compare(c: CodecCase, where: torch.device, shift: int) -> None:
    on_device = run_case(moved(c, where, shift), device)
    on_host = run_case(c)
    for name in ("norms", "masks", "words", "out", *(["residual"] if c.residual is not None else [])):
        assert same(getattr(on_host, name), getattr(on_device, name)), (name, c.tiling, c.lanes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_codes(
    where: torch.device, dtype: torch.dtype, feedback: bool, plan: tuple[tuple[int, ...], int]
) -> None:
    for index, numel in enumerate(LENGTHS):
        x = numbers(numel, index, dtype)
        residual = residuals_for(numel, index) if feedback else None
        row = (512, 16, 100, 1000)[index % 4]
        compare(make_case(x, residual, *plan, row, index % 3 == 0, index, dtype), where, index % 5)


def test_both_words_are_covered() -> None:
    words = {(make_case(torch.ones(9), None, *plan, 16).lanes.word, len(plan[0]) > 1) for plan in PLANS}
    assert words == {(32, False), (64, False), (32, True), (64, True)}


@pytest.mark.parametrize("value", [float("nan"), float("-nan"), float("inf"), -float("inf"), 1e30])
def test_norms_of_non_finite_values(where: torch.device, value: float) -> None:
    x = torch.linspace(-1, 1, 1000)
    x[[3, 700]] = value
    tiling = spec.Tiling.of(1000, 5, 64)
    for euclidean in (False, True):
        norms = [torch.zeros(tiling.rows, dtype=torch.uint16) for _ in range(2)]
        finish(host.norms(x, None, tiling, euclidean, norms[0]))
        result = there(norms[1], where)
        finish(device.norms(there(x, where), None, tiling, euclidean, result))
        assert same(norms[0], result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(where: torch.device, dtype: torch.dtype) -> None:
    for index, numel in enumerate((*LENGTHS, 0, 16384, 16384 * 3 + 47)):
        x, offset = numbers(numel, index, dtype) if numel else torch.zeros(0, dtype=dtype), 2**32 - 50
        rotated, back = torch.empty(numel), torch.empty(numel, dtype=dtype)
        there_x = there(x, where, index % 5)
        there_rotated, there_back = there(rotated, where, index % 3), there(back, where, index % 2)
        finish(host.rotate(x, KEY, offset, rotated))
        finish(device.rotate(there_x, KEY, offset, there_rotated))
        # Their signs are not defined where both are not a number.
        assert same(torch.nan_to_num(rotated), torch.nan_to_num(there_rotated)), numel
        plain = residuals_for(numel, index) if numel else torch.zeros(0)
        finish(host.unrotate(plain, KEY, offset, back))
        finish(device.unrotate(there(plain, where), KEY, offset, there_back))
        assert same(back, there_back), numel


def test_rotation_in_place(where: torch.device) -> None:
    x = torch.randn(40021, generator=torch.Generator().manual_seed(0))
    expected, values = torch.empty(40021), there(x, where)
    finish(host.rotate(x, KEY, 5, expected))
    finish(device.rotate(values, KEY, 5, values))
    assert same(expected, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_coordinates(where: torch.device, dtype: torch.dtype) -> None:
    for numel in LENGTHS:
        for count in {0, 1, numel // 7, numel // 2, numel - 1, numel}:
            x, sampled = numbers(numel, 0, dtype), torch.empty(count)
            there_x, there_picked = there(x, where, 1), there(sampled, where, 1)
            finish(host.take_sample(x, KEY, sampled))
            finish(device.take_sample(there_x, KEY, there_picked))
            assert same(sampled, there_picked)
            for by_length, clear in ((True, True), (False, False), (True, False)):
                finish(host.put_sample(sampled, KEY, by_length, clear, x))
                finish(device.put_sample(there_picked, KEY, by_length, clear, there_x))
                assert same(x, there_x), (numel, count, by_length, clear)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_passes_of_an_average(
    where: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shift: int
) -> None:
    for numel in (*LENGTHS, 0, 9001):
        model, correction, average, snapshot = (
            numbers(numel, seed, dtype) if numel else torch.zeros(0, dtype=dtype) for seed in range(4)
        )
        buffers = [model, correction, average, snapshot]
        there_buffers = [there(buffer, where, shift * index) for index, buffer in enumerate(buffers)]

        def passes(model: Tensor, correction: Tensor, average: Tensor, snapshot: Tensor) -> Iterator[Any]:
            yield model_delta.accumulate(average, snapshot, correction)
            model_delta.take_snapshot(model, correction, average, snapshot)
            yield 0
            yield model_delta.accumulate(average, model, correction, 0.3)
            model_delta.apply_correction(model, correction)
            yield 0

        on_host = passes(*buffers)
        on_device = passes(*there_buffers)
        for squares in on_host:
            with monkeypatch.context() as patch:
                patch.setattr(model_delta, "_on_gpu", lambda _: True)
                assert float(next(on_device)) == pytest.approx(squares, rel=1e-13, nan_ok=True)
            for ours, theirs in zip(buffers, there_buffers, strict=True):
                assert same(one_nan(ours), one_nan(theirs)), numel


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.int64])
@pytest.mark.parametrize("ranks", [2, 3, 128])
def test_rows_are_reduced_in_place(where: torch.device, dtype: torch.dtype, ranks: int) -> None:
    for numel in (16, 64, 1040, 9088):
        rows = [
            torch.arange(numel * 3).view(3, numel).to(dtype)[rank % 3] * (rank + 1) for rank in range(ranks)
        ]
        if dtype.is_floating_point:
            rows = [numbers(numel, rank, dtype) / 256 for rank in range(ranks)]
        wide = torch.float32 if rows[0].element_size() < 4 else dtype
        total = rows[0].to(wide)
        for row in rows[1:]:
            total = total + row.to(wide)
        scale = 1 / 3 if dtype.is_floating_point else 1
        expected = (total * torch.tensor(scale, dtype=wide)).to(dtype)
        start, stop = 16, numel
        for targets in (slice(0, ranks), slice(1, 2)):
            there_rows = [there(row, where) for row in rows]
            device_sums.reduce_rows(there_rows, there_rows[targets], start, stop, scale)
            for rank, (row, found) in enumerate(zip(rows, there_rows, strict=True)):
                if rank in range(ranks)[targets]:
                    row = torch.cat([row[:start], expected[start:stop]])
                assert same(
                    one_nan(row) if wide != dtype else row, one_nan(found) if wide != dtype else found
                )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 128, 129, 300])
def test_weighted_sums(where: torch.device, dtype: torch.dtype, count: int) -> None:
    for index, numel in enumerate((*LENGTHS, 0, 9001)):
        terms = [
            numbers(numel, seed, dtype) / 512 if numel else torch.zeros(0, dtype=dtype)
            for seed in range(count)
        ]
        weights = [(-1) ** k / (k + 1.5) for k in range(count)]
        there_terms = [there(term, where, (index + k) % 3) for k, term in enumerate(terms)]
        weighted_sum(terms[-1], list(zip(terms, weights, strict=True)))
        device_sums.weighted_sum(there_terms[-1], list(zip(there_terms, weights, strict=True)))
        assert same(terms[-1], there_terms[-1]), numel


@pytest.mark.host("an error of the loader of kernels")
@pytest.mark.skipif(importlib.util.find_spec("cupy") is not None, reason="CuPy is here")
def test_without_cupy_the_error_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_loader, "multiprocessors", lambda _: 1)
    with pytest.raises(HpcsgdError, match="pip install") as caught:
        finish(device.take_sample(torch.zeros(4), KEY, torch.zeros(2)))
    assert "CuPy" in str(caught.value)


@pytest.mark.host("the sources")
@pytest.mark.skipif(nvrtc.library() is None, reason="no nvidia-cuda-nvrtc here")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvrtc_takes_the_sources(file: str, architecture: str) -> None:
    nbytes, log = nvrtc.compile_source(file, architecture)
    assert nbytes > 0 and "warning" not in log, log
