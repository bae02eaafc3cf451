"""Coding of the values that clients and servers exchange for one shard.

Clients push encoded gradients with error feedback (`Compressor.feedback`); all other values are encoded as
differences to a reference that both sides hold: a client's copy of the server's values or, with elastic
averaging, the server's copy of a client's model. Elastic updates are applied as decoded on both sides, so the
sum of all models and the centre is conserved.

Gradients of mode "sync" are summed without being decoded, see `hpcsgd.server.code_sum`.

A code is smaller than the values that it encodes: the size of a body distinguishes the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcsgd.compress.base import Compressor, RandomKey, Segment
from hpcsgd.compress.point_to_point import FACTOR_BYTES, PointToPointCodec, SharedReference, bytes_of
from hpcsgd.errors import HpcsgdError
from hpcsgd.server.code_sum import CodeSumClient, CodeSumServer
from hpcsgd.server.connection import Request
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus

_PUSH_SEED, _REPLY_SEED = 0, 1  # of random numbers that are equal on both sides

Extents = Sequence[tuple[int, int]]


class CodingConfig(NamedTuple):
    """Compression of a group's pushes and of their replies."""

    compressor: Compressor
    #: Mode of the servers: "elastic" pushes models, the others push gradients; "sync" sums their codes.
    mode: str
    rank: int  # number that is unique among groups, for stochastic rounding


def shard_codec(
    compressor: Compressor, dtype: torch.dtype, numel: int, total: int, tensors: Extents
) -> PointToPointCodec | None:
    """Codec of a shard; None if its codes are no smaller than its values.

    Parameters
    ----------
    compressor
        Compression scheme.
    dtype, numel
        Type and number of the shard's values; all shards together have `total` elements.
    tensors
        Range [start, stop) of each tensor in the shard.
    """
    inside = tuple((start, (stop - start,)) for start, stop in tensors)
    codec = PointToPointCodec(compressor, Segment(numel, 1, share=numel / total, tensors=inside), dtype)
    return codec if codec.nbytes + FACTOR_BYTES < numel * dtype.itemsize else None


class _DeltaCodec:
    """Common part of the client's and the server's side.

    Attributes
    ----------
    push_bytes, reply_bytes
        Sizes of codes.
    """

    def __init__(self, codec: PointToPointCodec, shard: int, mode: str) -> None:
        self._codec, self._shard, self._models = codec, shard, mode == "elastic"
        self.reply_bytes = codec.nbytes + FACTOR_BYTES
        self.push_bytes = self.reply_bytes if self._models else codec.nbytes

    def push_key(self, number: int, rank: int = 0) -> RandomKey:
        """Random key of push `number`, or of the code sum that follows version `number` of the values."""
        return RandomKey(_PUSH_SEED, number, self._shard, rank)

    def _reply_key(self, number: int) -> RandomKey:
        return RandomKey(_REPLY_SEED, number, self._shard, 0)


class ClientDeltaCodec(_DeltaCodec):
    """Client side.

    Attributes
    ----------
    reply_buffer
        Memory for the code of a reply.
    """

    def __init__(self, codec: PointToPointCodec, shard: int, coding: CodingConfig) -> None:
        super().__init__(codec, shard, coding.mode)
        self._coding, self._reference = coding, SharedReference(codec)
        has_residual = coding.compressor.feedback and not self._models
        self._residual = torch.zeros(codec.numel, device="cpu") if has_residual else None
        self._pushed = codec.zeros()
        self.reply_buffer = np.empty(self.reply_bytes, np.uint8)
        self._sum = CodeSumClient(codec, self._residual) if coding.mode == "sync" else None

    def encode_push(self, request: Request, values: Tensor) -> Request:
        """Request that pushes encoded values, which must stay unchanged until it is complete."""
        self._pushed, header = values, request.header
        if self._sum is not None:
            return self._start_sum(request, self._sum, self._sum.terms)
        code, key = None, self.push_key(header.push_number, self._coding.rank)
        if self._models:
            code = self._reference.encode_update(values, key)
        elif header.weight:  # a gradient of weight 0 may hold any values
            code = self._codec.encode(values.clone(), key, self._residual)
        return self._make_request(request, bytes_of(values) if code is None else code)

    def next_request(self, request: Request) -> Request | None:
        """Request that follows a reply; None after the last one."""
        reply = request.reply
        assert reply is not None
        if reply.status is ReplyStatus.NO_REFERENCE:
            self._reference.reset(self._pushed)
            return self._make_request(request, bytes_of(self._pushed))
        if self._sum is None or reply.status not in (ReplyStatus.CONTINUE, ReplyStatus.RESTART):
            return None
        if reply.status is ReplyStatus.RESTART:
            return self._start_sum(request, self._sum, reply.terms)
        assert request.coded_target is not None
        return self._make_request(request, self._sum.next_part(request.coded_target))

    def _start_sum(self, request: Request, code_sum: CodeSumClient, terms: int) -> Request:
        header = request.header
        if not header.weight:  # it adds nothing, whatever the values are
            return self._make_request(request, np.empty(0, np.uint8))
        key = self.push_key(header.version, self._coding.rank)
        part = code_sum.begin(self._pushed * header.weight, key, terms)
        if part is None:
            raise HpcsgdError(
                f"{self._coding.compressor} cannot represent the gradients of shard {self._shard}",
                got="inf or NaN: gradient + error-feedback residual, or its rotation, overflows",
                do="lower the learning rate (--learning-rate), or clip the gradient (--clip)",
            )
        return self._make_request(request, part)

    def _make_request(self, request: Request, body: np.ndarray) -> Request:
        header, coded_target = replace(request.header, nbytes=body.nbytes), self.reply_buffer
        if self._sum is not None and body.nbytes:
            header = replace(header, part=self._sum.part, terms=self._sum.terms)
            if self._sum.combined_bytes:
                coded_target = np.empty(self._sum.combined_bytes, np.uint8)
        return replace(request, header=header, source=body, coded_target=coded_target, reply=None)

    def decode_reply(self, reply: Header, values: Tensor) -> None:
        """Decode the last reply into `values`; if it was no code, they hold it already."""
        if self._sum is not None:
            self._sum.end(reply.status is ReplyStatus.OK)
        if self._models and reply.nbytes == self.reply_bytes:
            self._codec.decode(self.reply_buffer, values, self._reply_key(reply.push_number))
        elif reply.nbytes == self.reply_bytes:
            self._reference.apply_update(self.reply_buffer, self._reply_key(reply.version))
            assert self._reference.values is not None
            values.copy_(self._reference.values)
        elif reply.nbytes and not self._models:
            self._reference.reset(values)

    def state_dict(self) -> dict[str, Any]:
        """Residual, reference, and the number of clients in a code sum."""
        parts = {"residual": self._residual, "told": self._reference.values}
        state = {name: None if part is None else part.clone() for name, part in parts.items()}
        return state if self._sum is None else {**state, "terms": self._sum.terms}

    def load_state_dict(self, state: dict[str, Any], with_reference: bool) -> None:
        """Restore a state of `state_dict`; without `with_reference` its residual only."""
        if self._residual is not None:
            self._residual.copy_(state["residual"])
        if with_reference:
            self._reference.values = None if state["told"] is None else state["told"].clone()
        if with_reference and self._sum is not None:
            self._sum.set_terms(state.get("terms", 1))  # older checkpoints have none


class ServerDeltaCodec(_DeltaCodec):
    """Server side, for all clients.

    Attributes
    ----------
    code_sum
        Sums pushes without decoding them; None: they are decoded one by one.
    reference_versions
        By client: version of the shard's values to which its reference was last updated.
    """

    def __init__(self, codec: PointToPointCodec, shard: int, mode: str) -> None:
        super().__init__(codec, shard, mode)
        self.code_sum = CodeSumServer(codec) if mode == "sync" else None
        self._references: dict[str, SharedReference] = {}
        self.reference_versions: dict[str, int] = {}
        self._unconfirmed: set[str] = set()
        self._differences: dict[str, np.ndarray | None] = {}

    def accepts(self, header: Header, clients: int) -> bool:
        """Whether a push has the size of a code, or of a part of a sum of at most `clients` clients."""
        if self.code_sum is None:
            return header.nbytes == self.push_bytes
        if not header.weight:
            return header.nbytes == 0
        if not 0 < header.terms <= clients:  # the reply will hold the right number
            return header.nbytes <= self._codec.zeros().nbytes
        return self.code_sum.has_valid_size(header.nbytes, header.part, header.terms)

    def decode_push(self, client: str, number: int, body: np.ndarray, values: Tensor) -> bool:
        """Decode a push into `values`; if it was no code, they hold it already.

        Returns False if the push is a difference to a reference that the server lacks. Raises an exception of
        any type for an invalid code.
        """
        is_code, key = body.nbytes == self.push_bytes, self.push_key(number)
        if not self._models:
            if is_code:
                self._codec.decode(body, values, key)
            return True
        reference = self._reference_of(client)
        if not is_code:
            reference.reset(values)
        elif reference.values is None:
            return False
        else:
            reference.apply_update(body, key)
            values.copy_(reference.values)
        return True

    def apply_elastic(self, centre: Tensor, differences: Sequence[tuple[str, int, Tensor]]) -> None:
        """Encode each client's elastic difference, and add it as decoded to the centre.

        Parameters
        ----------
        centre
            Values of the shard, updated in place.
        differences
            Name of a client, number of its push, and its elastic difference, replaced by the decoded one.
        """
        for client, number, difference in differences:
            self._differences[client] = self._codec.encode_scaled(difference, self._reply_key(number))
            centre += difference

    def encode_reply(self, client: str, header: Header, values: Tensor) -> np.ndarray | None:
        """Code of a reply with these values; None: the values must be sent, which may be changed in place."""
        if self._models:
            return self._differences.get(client)
        reference, version = self._reference_of(client), header.version
        behind = version - self.reference_versions.get(client, version - 1)
        self.reference_versions[client] = version
        unconfirmed = client in self._unconfirmed
        self._unconfirmed.discard(client)
        # Late, or away for more than an update: the client is far from these values.
        if header.status is ReplyStatus.LATE or (unconfirmed and behind > 1):
            reference.reset(values)
            return None
        code = (
            None if unconfirmed and not behind else reference.encode_update(values, self._reply_key(version))
        )
        if not unconfirmed:
            return code
        assert reference.values is not None
        values.copy_(reference.values)
        return None

    def continue_from_reference(self, client: str, version: int, values: Tensor) -> None:
        """Replace the shard's values by a client's reference of the same version.

        Its loops may begin and end at times of their own, as for an exchange of signals: its model has the
        bits that it would have without them.
        """
        if self._models or self.reference_versions.get(client) != version:
            return
        reference = self._reference_of(client).values
        if reference is not None:
            values.copy_(reference)

    def replay_reply(self, client: str, version: int, centre: Tensor) -> None:
        """Update a client's reference as the reply to its push has, of which only the update was logged."""
        if not self._models:
            self.encode_reply(client, Header(MessageType.REPLY, version=version), centre.clone())

    def on_reconnect(self, client: str) -> None:
        """Send whole values next: which reply the client received last is unknown.

        Of gradients' replies they are those of the reference, so that the client continues with the bits that
        it would have had.
        """
        if self._models:
            self.forget(client)
        else:
            self._unconfirmed.add(client)

    def forget(self, client: str) -> None:
        """Remove a client's reference."""
        self._references.pop(client, None)
        self.reference_versions.pop(client, None)

    def _reference_of(self, client: str) -> SharedReference:
        return self._references.setdefault(client, SharedReference(self._codec))

    def state_dict(self) -> dict[str, Tensor]:
        """References of all clients; those with equal values, as of clients in step, share their memory."""
        state: dict[str, Tensor] = {}
        for name, reference in self._references.items():
            values = reference.values
            if values is not None:
                equal = (each for each in state.values() if torch.equal(_bits(each), _bits(values)))
                found = next(equal, None)
                state[name] = values.clone() if found is None else found
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state of `state_dict`."""
        self._references.clear()
        for name, values in state.items():
            self._reference_of(name).reset(values)


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.uint8)
