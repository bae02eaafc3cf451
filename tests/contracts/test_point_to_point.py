"""Point-to-point codes: the receiver decodes, bit for bit, the sender's values, with every scheme."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcsgd.compress import build, spec_of
from hpcsgd.compress.base import Compressor, RandomKey, Segment
from hpcsgd.compress.point_to_point import FACTOR_BYTES, PointToPointCodec, SharedReference
from hpcsgd.errors import BadOption
from tests.support import compressor_rows as c

pytestmark = pytest.mark.host("codes of a server")
ROWS = [row for row in [*c.ROWS, c.with_feedback(c.randk())] if row.name != "powersgd"]
each_row = pytest.mark.parametrize("row", ROWS, ids=str)
SIZES = (0, 1, 7, 1000, 4097)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SENDER_KEY, RECEIVER_KEY = RandomKey(3, 5, 2, 77), RandomKey(3, 5, 2, 0)  # equal but for the rank


def segment_of(numel: int) -> Segment:
    half = numel // 2
    return Segment(numel, 1, share=0.5, tensors=((0, (half,)), (half, (numel - half,))))


def drawn(numel: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(numel, generator=generator) * 10.0 ** (seed % 3)).to(dtype)


def pair(row: c.Row, numel: int, dtype: torch.dtype) -> tuple[PointToPointCodec, PointToPointCodec]:
    sender, receiver = (PointToPointCodec(build(row.spec), segment_of(numel), dtype) for _ in range(2))
    return sender, receiver


def bits(values: Tensor) -> bytes:
    return values.view(torch.uint8).numpy(force=True).tobytes()


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoded_values_are_those_of_the_sender(row: c.Row, dtype: torch.dtype) -> None:
    for numel in SIZES:
        check_a_code(row, numel, dtype)


def check_a_code(row: c.Row, numel: int, dtype: torch.dtype) -> None:
    sender, receiver = pair(row, numel, dtype)
    assert sender.nbytes == sum(row.wire(segment_of(numel)))
    residual = torch.zeros(numel) if row.feedback else None
    found = torch.full((numel,), 7, dtype=dtype)
    for step in range(3):
        values = drawn(numel, dtype, step)
        before = values.double() + (0 if residual is None else residual.double())
        code = sender.encode(values, replace(SENDER_KEY, step=step), residual)
        assert code is not None and code.nbytes == sender.nbytes
        receiver.decode(code.copy(), found, replace(RECEIVER_KEY, step=step))
        assert bits(found) == bits(values)
        atol = float(before.abs().max()) * max(torch.finfo(dtype).eps * 2, 1e-6) if numel else 0.0
        if residual is not None and not row.rotated:
            torch.testing.assert_close(found.double() + residual, before, rtol=0, atol=atol)
        if row.spec in ("randk:ratio=1.0", "topk:ratio=1.0"):
            torch.testing.assert_close(found.double(), before, rtol=0, atol=atol)


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_a_factor_the_error_is_smaller_than_the_values(row: c.Row, dtype: torch.dtype) -> None:
    for numel in SIZES:
        sender, receiver = pair(row, numel, dtype)
        values, found = drawn(numel, dtype), torch.empty(numel, dtype=dtype)
        before = values.to(torch.float64, copy=True)
        code = sender.encode_scaled(values, SENDER_KEY)
        assert code is not None and code.nbytes == sender.nbytes + FACTOR_BYTES
        receiver.decode(code, found, RECEIVER_KEY)
        assert bits(found) == bits(values)
        left, there_was = (before - found.double()).norm(), before.norm()
        assert left <= there_was * (1 + 1e-6) and (left < there_was or numel <= 7)


@each_row
def test_non_finite_values_are_not_encoded_and_change_nothing(row: c.Row) -> None:
    sender, receiver = pair(row, 100, torch.float32)
    for bad in (torch.nan, torch.inf):
        values, residual = drawn(100), torch.ones(100) if row.feedback else None
        values[[3, 50]] = bad
        before = values.clone()
        assert sender.encode(values, SENDER_KEY, residual) is None
        assert bits(values) == bits(before)
        assert residual is None or bool((residual == 1).all())
    values, found = drawn(100), torch.empty(100)
    code = sender.encode(values, SENDER_KEY, None)
    assert code is not None  # as if nothing had been
    receiver.decode(code, found, RECEIVER_KEY)
    assert bits(found) == bits(values)


@each_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_references_have_the_same_bits_and_converge(row: c.Row, dtype: torch.dtype) -> None:
    """Coordinates that were not sent are part of the next difference; none is multiplied too much."""
    numel = 600
    one, other = map(SharedReference, pair(row, numel, dtype))
    start, target, distances = drawn(numel, dtype, 1), drawn(numel, dtype), []
    assert one.encode_update(start, SENDER_KEY) is None
    other.reset(start)
    for step in range(60):
        code = one.encode_update(target, RandomKey(1, step, 0, 5))
        assert code is not None
        other.apply_update(code, RandomKey(1, step, 0, 0))
        assert one.values is not None and other.values is not None
        assert bits(one.values) == bits(other.values)
        distances.append(float((one.values.double() - target.double()).norm()))
    assert all(b <= a * (1 + 1e-6) + 1e-6 for a, b in pairwise(distances)) or dtype.itemsize == 2
    # In half precision the values themselves are rounded.
    assert distances[-1] < 0.5 * distances[0] or row.exact, distances
    if row.exact and dtype == torch.float32 and row.name in ("fp16", "bf16", "topk", "randk"):
        assert distances[-1] < 0.05 * distances[0], distances


@each_row
def test_a_non_finite_difference_is_sent_uncompressed(row: c.Row) -> None:
    one = SharedReference(pair(row, 50, torch.float32)[0])
    assert one.encode_update(drawn(50), SENDER_KEY) is None
    assert one.encode_update(drawn(50, seed=1), SENDER_KEY) is not None
    bad = torch.full((50,), torch.inf)
    for values in (bad, bad, drawn(50)):
        assert one.encode_update(values, SENDER_KEY) is None
        assert one.values is not None and bits(one.values) == bits(values)
    assert one.encode_update(drawn(50, seed=1), SENDER_KEY) is not None


@each_row
def test_bytes_that_are_no_code_end_in_an_error_or_in_numbers(row: c.Row) -> None:
    receiver, random = pair(row, 700, torch.float32)[1], np.random.default_rng(1)
    for value in (0, 255, None, None, None):
        code = random.integers(0, 256, receiver.nbytes).astype(np.uint8)
        if value is not None:
            code[:] = value
        values = torch.empty(700)
        try:
            receiver.decode(code, values, RECEIVER_KEY)
        except (IndexError, RuntimeError, ValueError, OverflowError):
            assert row.name == "topk"  # whose code holds indices


def test_stateful_schemes_are_refused() -> None:
    for spec in ("powersgd", "ef+powersgd:rank=1"):
        with pytest.raises(BadOption, match="cannot compress messages to and from a parameter server"):
            PointToPointCodec(build(spec), segment_of(9), torch.float32)


@pytest.mark.parametrize("row", c.ROWS, ids=str)
def test_a_compressor_has_a_spec_that_makes_it_again(row: c.Row) -> None:
    compressor = build(row.spec)
    assert str(build(spec_of(compressor))) == str(compressor)
    assert spec_of(build(spec_of(compressor))) == spec_of(compressor)


def test_an_unregistered_compressor_has_no_spec() -> None:
    class Own(Compressor):
        pass

    with pytest.raises(BadOption, match="is not registered"):
        spec_of(Own())
