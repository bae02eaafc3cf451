"""Clients that push and receive codes, as a group does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hpcsgd.compress import build
from hpcsgd.compress.point_to_point import bytes_of
from hpcsgd.server import Server
from hpcsgd.server.connection import Request
from hpcsgd.server.delta_coding import ClientDeltaCodec, CodingConfig, shard_codec
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from tests.support.protocol_clients import ScriptedClient, make_contract

SIZE = 400


SPECS = [
    "bf16",
    "ef+maxnorm:scale=tensor",
    "ef+hadamard+maxnorm:bits=3",
    "randk:ratio=0.3",
    "ef+topk:ratio=0.05",
]


def contract_with_compression(
    spec: str, mode: str, sizes: list[int], dtype: str = "float32"
) -> dict[str, Any]:
    tensors = [[[0, size // 2], [size // 2, size]] for size in sizes]
    return make_contract(sizes, mode, dtype, compress={"scheme": spec, "tensors": tensors})


def random_values(seed: int, dtype: Any = np.float32, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(dtype)


class CodingClient(ScriptedClient):
    """Client that sends and receives codes; its model is the one in the replies."""

    def __init__(self, server: Server, name: str, spec: str, dtype: str = "float32", lr: float = 0.1) -> None:
        mode = server.policy.mode
        super().__init__(server, name, contract_with_compression(spec, mode, [SIZE], dtype), [{"lr": lr}])
        compressor = build(spec)
        assert compressor is not None
        self.elastic = mode == "elastic"
        coding = CodingConfig(compressor, mode, sum(name.encode()))
        tensors = [(0, SIZE // 2), (SIZE // 2, SIZE)]
        point_to_point = shard_codec(compressor, getattr(torch, dtype), SIZE, SIZE, tensors)
        assert point_to_point is not None
        self.codec = ClientDeltaCodec(point_to_point, 0, coding)
        self.model = torch.zeros(SIZE, dtype=point_to_point.dtype)
        self.difference = torch.zeros(SIZE, dtype=point_to_point.dtype)
        self.request: Request | None = None
        self.replies: list[tuple[ReplyStatus, int]] = []

    @property
    def dense_bytes(self) -> int:
        return self.model.nbytes

    def pull_model(self, values: np.ndarray | None = None, joins: bool = False) -> None:
        if values is not None:
            self.initialize(values)
        dtype = values.dtype if values is not None else None
        self.model.copy_(torch.from_numpy(self.pull(0, dtype, joins).copy()))

    def pull(self, shard: int = 0, dtype: Any = None, joins: bool = False) -> np.ndarray:
        return super().pull(shard, dtype or self.model.numpy(force=True).dtype, joins)

    def push_values(self, gradient: np.ndarray | None = None, weight: float = 1.0) -> None:
        """Push a gradient, or the model."""
        self.push_numbers[0] = number = self.push_numbers.get(0, 0) + 1
        self.pushed = self.model.clone() if gradient is None else torch.from_numpy(gradient)
        version = self.versions.get(0, 0)
        header = Header(
            MessageType.PUSHPULL, push_number=number, version=version, weight=weight, nbytes=self.dense_bytes
        )
        self.request = self.codec.encode_push(Request(header, bytes_of(self.pushed)), self.pushed)
        self.send_request()

    def send_request(self) -> None:
        """Send the current request, again if it was sent before."""
        assert self.request is not None
        self.link.send(self.request.header, self.request.source)
        self.deliver()

    def receive_replies(self, messages: int = 10) -> None:
        """Handle up to `messages` replies, and send the requests that follow."""
        self.receive()
        for _ in range(messages):
            if not self.received:
                break
            header, body = self.received.pop(0)
            assert self.request is not None and header.push_number == self.request.header.push_number
            target, coded = self.difference if self.elastic else self.model, self.request.coded_target
            if coded is not None and header.nbytes == coded.nbytes:
                coded[:] = body
            elif header.nbytes:
                bytes_of(target)[:] = body
            self.request.reply = header
            next_request = self.codec.next_request(self.request)
            if next_request is not None:
                self.request = next_request
                self.send_request()
                self.receive()
                continue
            self.replies.append((header.status, header.nbytes))
            self.codec.decode_reply(header, target)
            if self.elastic:
                self.model -= self.difference
            self.request = None

    def disconnect(self) -> None:
        self.received.clear()
        self.link.close()
        self.deliver()

    def reconnect(self) -> None:
        self.connect()
        if self.request is not None:
            self.send_request()


def make_clients(server: Server, count: int, spec: str, dtype: str = "float32") -> list[CodingClient]:
    clients = [CodingClient(server, f"g{i}", spec, dtype) for i in range(count)]
    clients[0].pull_model(np.zeros(SIZE, dtype))
    for client in clients[1:]:
        client.pull_model()
    server.start_steps(None)
    return clients


def exchange_all(clients: list[CodingClient]) -> None:
    """Exchange messages until all pushes are complete."""
    for _ in range(8):
        for client in clients:
            client.receive_replies()
    assert all(client.request is None for client in clients)


def centre(server: Server) -> torch.Tensor:
    values = server.shards[0].centre
    assert values is not None
    return values


def reference_of(server: Server, client: str) -> torch.Tensor | None:
    codec = server.shards[0].codec
    assert codec is not None
    return codec.state_dict().get(client)


def bits(values: torch.Tensor) -> bytes:
    return values.numpy(force=True).tobytes()


def mean_of(server: Server) -> np.ndarray:
    """Mean gradient that was applied once to zero values, at a rate of 0.1."""
    values: np.ndarray = centre(server).double().numpy(force=True) / -0.1
    return values


def residual_of(client: CodingClient) -> np.ndarray:
    residual = client.codec.state_dict()["residual"]
    assert residual is not None
    values: np.ndarray = residual.double().numpy(force=True)
    return values
