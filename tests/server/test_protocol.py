"""Headers and JSON bodies: invalid messages are rejected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.server.protocol import HEADER_BYTES, Header, MessageType, ProtocolError, ReplyStatus, decode_json

HEADS = st.builds(
    Header,
    type=st.sampled_from(MessageType),
    shard=st.integers(0, 2**32 - 1),
    status=st.sampled_from(ReplyStatus),
    push_number=st.integers(0, 2**40),
    version=st.integers(0, 2**40),
    weight=st.floats(0, allow_nan=False, allow_infinity=False),
    steps=st.integers(0, 2**40),
    steps_begun=st.integers(0, 2**40),
    nbytes=st.integers(0, 2**40),
)


@given(HEADS)
@settings(max_examples=60, deadline=None)
def test_header_survives_packing(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_BYTES and Header.unpack(packed) == header


@given(HEADS, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_modified_header_is_rejected_or_another_valid_one(header: Header, place: int, flip: int) -> None:
    packed = bytearray(header.pack())
    packed[place] ^= flip
    try:
        found = Header.unpack(packed)
    except ProtocolError:
        return
    assert 0 <= found.weight < float("inf")
    assert all(
        0 <= n <= 2**40
        for n in (found.push_number, found.version, found.steps, found.steps_begun, found.nbytes)
    )


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
@settings(max_examples=40, deadline=None)
def test_random_bytes_are_no_header(junk: bytes) -> None:
    with pytest.raises(ProtocolError):
        Header.unpack(junk)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_invalid_weight_is_rejected(weight: float) -> None:
    with pytest.raises(ProtocolError):
        Header.unpack(Header(MessageType.PUSH, weight=weight).pack())


NESTED = [b'{"a":' * 50 + b"1" + b"}" * 50, b'{"a":' + b"[" * 200 + b"]" * 200 + b"}"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"3", b"{", b"\xff\xfe", b"null", b"[" * 100_000, *NESTED, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=lambda body: repr(body[:12]),
)
def test_invalid_json_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_json(np.frombuffer(body, np.uint8))
