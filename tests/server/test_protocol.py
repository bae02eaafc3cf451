"""Heads and notes: what is no message of hpcsgd is found to be none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server.protocol import HEAD_BYTES, Head, Kind, Malformed, State, read_note

HEADS = st.builds(
    Head,
    kind=st.sampled_from(Kind),
    shard=st.integers(0, 2**32 - 1),
    state=st.sampled_from(State),
    round=st.integers(0, 2**40),
    version=st.integers(0, 2**40),
    weight=st.floats(0, allow_nan=False, allow_infinity=False),
    steps=st.integers(0, 2**40),
    begun=st.integers(0, 2**40),
    nbytes=st.integers(0, 2**40),
)


@given(HEADS)
@settings(max_examples=60, deadline=None)
def test_a_head_is_read_as_it_was_written(head: Head) -> None:
    packed = head.pack()
    assert len(packed) == HEAD_BYTES and Head.unpack(packed) == head


@given(HEADS, st.integers(0, HEAD_BYTES - 1), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_a_head_that_was_changed_is_another_or_none(head: Head, place: int, flip: int) -> None:
    packed = bytearray(head.pack())
    packed[place] ^= flip
    try:
        found = Head.unpack(packed)
    except Malformed:
        return
    assert 0 <= found.weight < float("inf")
    assert all(0 <= n <= 2**40 for n in (found.round, found.version, found.steps, found.begun, found.nbytes))


@given(st.binary(min_size=HEAD_BYTES, max_size=HEAD_BYTES))
@settings(max_examples=40, deadline=None)
def test_junk_is_no_head(junk: bytes) -> None:
    with pytest.raises(Malformed):
        Head.unpack(junk)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_is_a_number_of_gradients(weight: float) -> None:
    with pytest.raises(Malformed):
        Head.unpack(Head(Kind.PUSH, weight=weight).pack())


NESTED = [b'{"a":' * 50 + b"1" + b"}" * 50, b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"3", b"{", b"\xff\xfe", b"null", b"[" * 100_000, *NESTED, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_note_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        read_note(np.frombuffer(body, np.uint8))
