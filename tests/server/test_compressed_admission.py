"""Handshake and messages of clients with invalid or different compression."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from tests.support.coding_clients import (
    SIZE,
    CodingClient,
    contract_with_compression,
    make_clients,
    random_values,
)
from tests.support.protocol_clients import ScriptedClient, make_contract


@pytest.mark.parametrize(
    ("compress", "text"),
    [
        ({"scheme": "zip", "tensors": [[]]}, "unknown compression scheme 'zip'"),
        ({"scheme": "maxnorm:bits=99", "tensors": [[]]}, "option 'bits'"),
        (
            {"scheme": "ef+powersgd", "tensors": [[]]},
            "cannot compress messages to and from a parameter server",
        ),
        ({"scheme": 7, "tensors": [[]]}, "the client's compression cannot be used"),
        ({"scheme": "bf16"}, "no valid description of the model"),
        ({"scheme": "bf16", "tensors": []}, "no valid description of the model"),
        ({"scheme": "bf16", "tensors": [[[0, 9], [5, SIZE]]]}, "no valid description of the model"),
        ({"scheme": "bf16", "tensors": [[[0, SIZE + 1]]]}, "no valid description of the model"),
        ({"scheme": "bf16", "tensors": [["a"]]}, "no valid description of the model"),
        ("bf16", "the client's compression cannot be used"),
        (5, "the client's compression cannot be used"),
    ],
)
def test_invalid_compression_is_refused(compress: Any, text: str) -> None:
    server = Server(Policy("async"))
    client = ScriptedClient(server, "a", make_contract([SIZE], compress=compress))
    assert not client.admitted
    assert re.search(text, client.refusal), client.refusal
    (other,) = make_clients(server, 1, "bf16")
    assert other.admitted


def test_different_compression_is_refused() -> None:
    server = Server(Policy("async"))
    make_clients(server, 1, "bf16")
    for contract in (
        make_contract([SIZE], compress=None),
        contract_with_compression("ef+bf16", "async", [SIZE]),
    ):
        other = ScriptedClient(server, "b", contract)
        assert not other.admitted and other.refusal.startswith("compress differs")
    server = Server(Policy("async"))
    assert ScriptedClient(server, "a", make_contract([SIZE], compress=None)).admitted
    other = ScriptedClient(server, "b", contract_with_compression("bf16", "async", [SIZE]))
    assert not other.admitted and other.refusal.startswith("compress differs")


def test_invalid_code_disconnects_its_client_alone() -> None:
    server = Server(Policy("async"))
    one, two = make_clients(server, 2, "ef+topk:ratio=0.05")
    code = np.full(one.codec.push_bytes, 255, np.uint8)
    one.send(Header(MessageType.PUSHPULL, push_number=1, weight=1.0), code)
    assert not one.admitted and "an invalid code" in one.refusal
    for kind, size in (
        (MessageType.INIT, two.codec.push_bytes),
        (MessageType.PUSH, 3),
        (MessageType.PUSH, 0),
    ):
        other = CodingClient(server, f"x{kind}{size}", "ef+topk:ratio=0.05")
        other.send(Header(kind, push_number=1, weight=1.0), np.zeros(size, np.uint8))
        assert not other.admitted, (kind, size)
    two.push_values(random_values(1))
    two.receive_replies()
    assert two.replies == [(ReplyStatus.OK, two.dense_bytes)]


def test_shard_whose_codes_are_not_smaller_is_sent_dense() -> None:
    server = Server(Policy("async"))
    client = ScriptedClient(
        server, "a", contract_with_compression("ef+topk:ratio=1", "async", [SIZE, 1]), [{"lr": 0.1}]
    )
    for shard, size in enumerate((SIZE, 1)):
        client.initialize(np.zeros(size, np.float32), shard)
        assert server.shards[shard].codec is None
        client.push(random_values(1, size=size), shard)
        assert client.pop_reply()[1].size == size
