"""Codes for one reader: it gets, bit for bit, what their writer was left with, whatever the scheme."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsgd.compress import Compressor, Draw, Stretch, build, spec_of
from hpcsgd.compress.point_to_point import FACTOR_BYTES, Coder, Told
from hpcsgd.errors import BadOption
from tests.support import compressor_rows as c

ROWS = [row for row in [*c.ROWS, c.with_feedback(c.randk())] if row.name != "powersgd"]
each_row = pytest.mark.parametrize("row", ROWS, ids=str)
SIZES = (0, 1, 7, 1000, 4097)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WRITER, READER = Draw(3, 5, 2, 77), Draw(3, 5, 2, 0)  # in common is what all ranks draw alike


def stretch_of(numel: int) -> Stretch:
    half = numel // 2
    return Stretch(numel, 1, share=0.5, tensors=((0, (half,)), (half, (numel - half,))))


def drawn(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=generator) * 10.0 ** (seed % 3)).to(dtype)


def pair(row: c.Row, numel: int, dtype: torch.dtype) -> tuple[Coder, Coder]:
    writer, reader = (Coder(build(row.spec), stretch_of(numel), dtype) for _ in range(2))
    return writer, reader


def bits(values: Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_read_is_what_was_written_and_the_rest_is_kept(row: c.Row, dtype: torch.dtype) -> None:
    for numel in SIZES:
        check_a_code(row, numel, dtype)


def check_a_code(row: c.Row, numel: int, dtype: torch.dtype) -> None:
    writer, reader = pair(row, numel, dtype)
    assert writer.nbytes == sum(row.wire(stretch_of(numel)))
    residual = torch.zeros(numel) if row.feedback else None
    found = torch.full((numel,), 7, dtype=dtype)
    for step in range(3):
        values = drawn(numel, dtype, step)
        before = values.double() + (0 if residual is None else residual.double())
        code = writer.write(values, replace(WRITER, step=step), residual)
        assert code is not None and code.nbytes == writer.nbytes
        reader.read(code.copy(), found, replace(READER, step=step))
        assert bits(found) == bits(values)
        atol = float(before.abs().max()) * max(torch.finfo(dtype).eps * 2, 1e-6) if numel else 0.0
        if residual is not None and not row.rotated:
            torch.testing.assert_close(found.double() + residual, before, rtol=0, atol=atol)
        if row.spec in ("randk:ratio=1.0", "topk:ratio=1.0"):
            torch.testing.assert_close(found.double(), before, rtol=0, atol=atol)


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_factor_less_is_left_than_there_was(row: c.Row, dtype: torch.dtype) -> None:
    for numel in SIZES:
        writer, reader = pair(row, numel, dtype)
        values, found = drawn(numel, dtype), torch.empty(numel, dtype=dtype)
        before = values.to(torch.float64, copy=True)
        code = writer.write_near(values, WRITER)
        assert code is not None and code.nbytes == writer.nbytes + FACTOR_BYTES
        reader.read(code, found, READER)
        assert bits(found) == bits(values)
        left, there_was = (before - found.double()).norm(), before.norm()
        assert left <= there_was * (1 + 1e-6) and (left < there_was or numel <= 7)


@each_row
def test_what_is_not_finite_is_not_written_and_changes_nothing(row: c.Row) -> None:
    writer, reader = pair(row, 100, torch.float32)
    for bad in (torch.nan, torch.inf):
        values, residual = drawn(100), torch.ones(100) if row.feedback else None
        values[[3, 50]] = bad
        before = values.clone()
        assert writer.write(values, WRITER, residual) is None
        assert bits(values) == bits(before)
        assert residual is None or bool((residual == 1).all())
    values, found = drawn(100), torch.empty(100)
    code = writer.write(values, WRITER, None)
    assert code is not None  # as if nothing had been
    reader.read(code, found, READER)
    assert bits(found) == bits(values)


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_parties_have_the_same_bits_and_come_near(row: c.Row, dtype: torch.dtype) -> None:
    """Coordinates that were not said are in the next difference; none is said too loudly."""
    numel = 600
    one, other = map(Told, pair(row, numel, dtype))
    start, target, distances = drawn(numel, dtype, 1), drawn(numel, dtype), []
    assert one.tell(start, WRITER) is None
    other.give(start)
    for step in range(60):
        code = one.tell(target, Draw(1, step, 0, 5))
        assert code is not None
        other.hear(code, Draw(1, step, 0, 0))
        assert one.values is not None and other.values is not None
        assert bits(one.values) == bits(other.values)
        distances.append(float((one.values.double() - target.double()).norm()))
    assert all(b <= a * (1 + 1e-6) + 1e-6 for a, b in pairwise(distances)) or dtype.itemsize == 2
    # In half precision the values themselves are rounded.
    assert distances[-1] < 0.5 * distances[0] or row.exact, distances
    if row.exact and dtype == torch.float32 and row.name in ("fp16", "bf16", "topk", "randk"):
        assert distances[-1] < 0.05 * distances[0], distances


@each_row
def test_a_difference_that_is_not_finite_is_given_as_it_is(row: c.Row) -> None:
    one = Told(pair(row, 50, torch.float32)[0])
    assert one.tell(drawn(50), WRITER) is None
    assert one.tell(drawn(50, seed=1), WRITER) is not None
    bad = torch.full((50,), torch.inf)
    for values in (bad, bad, drawn(50)):
        assert one.tell(values, WRITER) is None
        assert one.values is not None and bits(one.values) == bits(values)
    assert one.tell(drawn(50, seed=1), WRITER) is not None


@each_row
def test_bytes_that_are_no_code_end_in_an_error_or_in_numbers(row: c.Row) -> None:
    reader, random = pair(row, 700, torch.float32)[1], np.random.default_rng(1)
    for value in (0, 255, None, None, None):
        code = random.integers(0, 256, reader.nbytes).astype(np.uint8)
        if value is not None:
            code[:] = value
        values = torch.empty(700)
        try:
            reader.read(code, values, READER)
        except (IndexError, RuntimeError, ValueError, OverflowError):
            assert row.name == "topk"  # which says where


def test_schemes_that_go_on_from_their_last_result_are_refused() -> None:
    for spec in ("powersgd", "ef+powersgd:rank=1"):
        with pytest.raises(BadOption, match="cannot compress what goes to and from a server"):
            Coder(build(spec), stretch_of(9), torch.float32)


@pytest.mark.parametrize("row", c.ROWS, ids=str)
def test_a_compressor_has_a_spec_that_makes_it_again(row: c.Row) -> None:
    compressor = build(row.spec)
    assert str(build(spec_of(compressor))) == str(compressor)
    assert spec_of(build(spec_of(compressor))) == spec_of(compressor)


def test_one_that_is_not_known_has_none() -> None:
    class Own(Compressor):
        pass

    with pytest.raises(BadOption, match="has no name"):
        spec_of(Own())
