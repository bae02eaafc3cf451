"""Every compression scheme over simulated ranks: sums, error feedback, bounds, bits, bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpcsgd.compress import COMPRESSORS, WRAPPERS, base, build
from hpcsgd.compress.base import RandomKey, Segment
from hpcsgd.errors import BadOption
from hpcsgd.kernels.codec import host
from tests.support import compressor_rows as c
from tests.support.compression_invariants import (
    lockstep,
    numbers,
    reduce_and_check,
    residuals_of,
    segment_of,
)
from tests.support.devices import fewer
from tests.support.simulated_codecs import buffers_of, unsigned

each_row = pytest.mark.parametrize("row", c.ROWS, ids=str)
each_family = pytest.mark.parametrize("family", c.FAMILIES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = st.sampled_from([0, 1, 2, 3, 16, 511, 512, 513, 2559, 2560, 2561, 4097, 10_007]) | st.integers(
    0, 900
)
RANKS = st.sampled_from([1, 2, 3, 4, fewer(64)]) | st.integers(1, fewer(64))
SEEN = 100_000  # elements of all ranks, at most


def test_every_scheme_has_rows() -> None:
    assert {row.name for row in c.ROWS} == set(COMPRESSORS)
    assert set(c.FAMILIES) == {*COMPRESSORS, *WRAPPERS}
    assert {name for row in c.ROWS for name in row.spec.split("+")[:-1]} == set(WRAPPERS)


@each_family
@settings(max_examples=fewer(25), deadline=None)
@given(
    st.data(),
    LENGTHS,
    RANKS,
    st.sampled_from(DTYPES),
    st.sampled_from(["normal", "heavy", "sparse", "blocks", "whole"]),
    st.integers(0, 2**31),
)
def test_the_result_is_the_sum_of_decoded_values_and_residuals_are_the_errors(
    family: str, data: st.DataObject, numel: int, ranks: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    row = data.draw(c.FAMILIES[family])
    numel = min(numel, SEEN // ranks)
    segment = segment_of(numel, ranks, first=seed % 1000)
    lock = lockstep(row, segment, feedback=True, seed=seed)
    for step in range(2):
        reduce_and_check(row, lock, numbers(kind, ranks, numel, dtype, seed + step), step)
        reduced = sum(size for op, size in lock.messages if op != "gather")
        gathered = sum(size for op, size in lock.messages if op == "gather")
        assert (reduced, gathered) == row.wire(segment)


@each_row
def test_without_feedback_nothing_else_changes(row: c.Row) -> None:
    rows = numbers("heavy", 3, 2000, torch.float32, 5)
    segment = segment_of(2000, 3)
    with_feedback, without = (lockstep(row, segment, feedback) for feedback in (True, False))
    corrected, plain = with_feedback.reduce(rows), without.reduce(rows)
    if row.name.startswith("randk"):
        assert torch.equal(corrected != 0, plain != 0)  # the same coordinates, with another factor
    else:
        assert torch.equal(corrected, plain)


@each_row
def test_the_same_key_gives_the_same_bits_and_another_key_other_bits(row: c.Row) -> None:
    # Equal on all ranks, so that only the random numbers differ.
    rows = numbers("normal", 1, 3000, torch.float32, 6).expand(3, -1).clone()
    segment = segment_of(3000, 3)

    def outcome(step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        lock = lockstep(row, segment, True, seed)
        return lock.reduce(rows, step), residuals_of(lock)

    result, residuals = outcome(4)
    again, residuals_again = outcome(4)
    assert torch.equal(again, result) and torch.equal(residuals_again, residuals)
    for other, _ in (outcome(5), outcome(4, seed=1)):
        if row.rounds or (row.draws and not row.exact):
            assert not torch.equal(other, result)
        elif not row.mixes:
            assert torch.equal(other, result)
    assert torch.equal(residuals[0], residuals[1]) == (not row.rounds)


@each_row
def test_chunks_and_threads_change_nothing(row: c.Row, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, segment = numbers("heavy", 2, 40_000, torch.bfloat16, 7), segment_of(40_000, 2)

    def outcome() -> tuple[Tensor, Tensor]:
        lock = lockstep(row, segment, True)
        return lock.reduce(rows), residuals_of(lock)

    result, residuals = outcome()
    monkeypatch.setattr(host, "CHUNK", 1500)
    monkeypatch.setattr(base, "CHUNK", 808)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            other, other_residuals = outcome()
        finally:
            torch.set_num_threads(1)
        assert torch.equal(other, result) and torch.equal(other_residuals, residuals)


@pytest.mark.parametrize("row", [row for row in c.ROWS if row.exact], ids=str)
def test_small_integers_are_exact(row: c.Row) -> None:
    for ranks in (1, 2, 7, 16):
        rows = numbers("whole", ranks, 1000, torch.float32, 0)
        out = lockstep(row, segment_of(1000, ranks), False).reduce(rows)
        assert torch.equal(out[0], rows.sum(0))


@pytest.mark.parametrize("bits", [2, 4, 7, 16])
def test_codes_are_integer_numbers_of_steps(bits: int) -> None:
    ranks, top = 3, c.levels(bits)
    rows = numbers("normal", ranks, 700, torch.float32, 1)
    lock = lockstep(c.maxnorm(bits, "bucket"), segment_of(700, ranks), True)
    lock.reduce(rows)
    # The norm travels as a bfloat16, rounded up.
    rows, residuals = rows.cpu(), residuals_of(lock).cpu()
    largest = rows.abs().max().view(torch.int32)
    norm = ((largest + 0xFFFF) >> 16 << 16).view(torch.float32).double()
    codes = (rows.double() - residuals) / norm * top
    assert (codes - codes.round()).abs().max() < 0.02
    assert codes.round().abs().max() <= top


@st.composite
def bits_and_terms(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """Bits of each scale and terms, up to the most that a lane can hold."""
    bits = draw(st.lists(st.integers(2, 16), min_size=1, max_size=3, unique=True).map(sorted))
    most = (2**32 - 1) // (2 * c.levels(bits[0]))
    terms = draw(st.integers(1, 70) | st.integers(1, most) | st.sampled_from([most]))
    return tuple(bits), min(terms, most)


@settings(max_examples=fewer(40), deadline=None)
@given(bits_and_terms(), st.sampled_from([1, 2, 63, 700]), st.sampled_from(["+", "-", "both"]))
def test_lanes_never_overflow(case: tuple[tuple[int, ...], int], numel: int, signs: str) -> None:
    """All ranks have the same largest numbers: one codec represents all."""
    bits, terms = case
    name = "maxnorm" if len(bits) == 1 else "multiscale"
    codec = build(f"{name}:bits={'x'.join(map(str, bits))}").codec(segment_of(numel, terms))
    values = torch.full((numel,), -1.0 if signs == "-" else 1.0)
    if signs == "both":
        values[::2] = -1
    result = values.clone()
    buffers = buffers_of(codec, result.device)
    for message in codec.run(result, buffers, RandomKey(0, 0, 0, 0), 1 / terms, None):
        if message is not None and message.op == "sum":
            words = unsigned(message.data)
            words = words * words.dtype.type(terms)
            message.data.copy_(torch.from_numpy(words).view(message.data.dtype))
    torch.testing.assert_close(result, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", ["maxnorm:bits=16", "ef+hadamard+randk-maxnorm:bits=16"])
def test_lanes_wider_than_a_word_are_an_error_that_names_the_options(spec: str) -> None:
    compressor = build(spec)
    compressor.codec(Segment(100, 65_000))
    with pytest.raises(BadOption, match=r"summed over 70000 terms: .* need 33 bits a code") as error:
        compressor.codec(Segment(100, 70_000))
    assert "use fewer bits" in str(error.value) and "two-level" in str(error.value)


@pytest.mark.parametrize("spec", ["maxnorm:bits=4", "multiscale"])
def test_bits_sent_are_those_of_the_lanes_and_few_more(spec: str) -> None:
    row = c.maxnorm() if spec.startswith("maxnorm") else c.multiscale()
    for numel, terms in ((1_048_576, 2), (11_200_000, 4), (262_144, 16)):
        word, lanes = c.lane(4, terms)
        bits = word / lanes + (1 if spec == "multiscale" else 0)
        assert row.wire(Segment(numel, terms))[0] <= 1.01 * numel * bits / 8


def test_finer_bits_have_smaller_errors() -> None:
    rows, segment = numbers("normal", 2, 4000, torch.float32, 8), segment_of(4000, 2)
    errors = []
    for bits in range(2, 17):
        lock = lockstep(c.maxnorm(bits), segment, True)
        lock.reduce(rows)
        errors.append(float(residuals_of(lock).norm()))
    assert all(b < 0.75 * a for a, b in pairwise(errors))
