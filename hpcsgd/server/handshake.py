"""Validates a client's handshake (identity, model layout, compression). All fields are untrusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import index
from typing import Any, NamedTuple

import torch

from hpcsgd.compress import build
from hpcsgd.compress.base import Compressor, Segment
from hpcsgd.compress.point_to_point import PointToPointCodec
from hpcsgd.mpi.consistency import first_difference
from hpcsgd.server.delta_coding import Extents, ServerDeltaCodec, shard_codec
from hpcsgd.server.protocol import ProtocolError
from hpcsgd.server.shard import Shard
from hpcsgd.server.update_rules import OPTIMIZERS, ElasticRule, OptimizerRule, Options, UpdateRule

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MAX_ELEMENTS = 2**40  # elements of a shard
_MAX_NAME, _MAX_TEXT = 200, 500  # characters

#: Settings that are equal for all clients of a server: versions, mode, model layout, optimizer, compression.
Contract = Mapping[str, Any]


class ClientIdentity(NamedTuple):
    """Identity of a client."""

    name: str  # name that it has given
    #: Its index among the gateway ranks of its group (see `hpcsgd.server.store`), and their number.
    gateway: int
    gateways: int
    options: Options  # options of its optimizer
    seed: int | None  # seed of the order of its data; None if it has sent none


def parse_identity(fields: Mapping[str, Any]) -> ClientIdentity:
    """Identity in the fields of a hello; raises `ProtocolError` if they are invalid."""
    try:
        position, seed = (index(fields["talker"]), index(fields["talkers"])), fields.get("seed")
        data_seed = seed if isinstance(seed, int) and position[0] == 0 else None
        found = ClientIdentity(fields["client"], *position, fields["options"], data_seed)
        has_name = found.name.isprintable() and 0 < len(found.name) <= _MAX_NAME
        if not has_name or not 0 <= found.gateway < found.gateways or not isinstance(found.options, list):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ProtocolError(
            "the client's hello message has no valid client name, gateway numbers or options"
        ) from None
    return found


def first_mismatch(expected: Contract, contract: Contract) -> str:
    """First entry in which a contract differs from the expected one, with both values; "" if none does."""
    for name, value in expected.items():
        if contract.get(name) != value:
            got, reference = first_difference([value, contract.get(name)])
            return f"{name} differs: expected {str(reference)[:_MAX_TEXT]}, got {str(got)[:_MAX_TEXT]}"
    return ""


def make_shards(
    contract: Contract, mode: str, alpha: float | None, server: int, servers: int
) -> dict[int, Shard]:
    """Shards of server `server` of `servers`, by index; raises `ProtocolError` if the contract is invalid."""
    compressor = _parse_compressor(contract)
    try:
        rows = list(enumerate(contract["shards"]))[server::servers]
        shards = {number: _parse_shard(number, row, contract, mode, alpha) for number, row in rows}
        if compressor is not None:
            for shard in shards.values():
                shard.make_codec = _codec_factory(compressor, contract, shard, mode)
        return shards
    except (KeyError, IndexError, TypeError, ValueError):
        raise ProtocolError("the client's hello message has no valid description of the model") from None


def _parse_compressor(contract: Contract) -> Compressor | None:
    described = contract.get("compress")
    if described is None:
        return None
    try:
        compressor = build(described["scheme"])
        if compressor is not None:
            PointToPointCodec(
                compressor, Segment(1, 1), torch.float32
            )  # raises for schemes that it cannot run
    except Exception as error:
        raise ProtocolError(f"the client's compression cannot be used: {str(error)[:_MAX_TEXT]}") from None
    return compressor


def _codec_factory(
    compressor: Compressor, contract: Contract, shard: Shard, mode: str
) -> Callable[[], ServerDeltaCodec | None]:
    total = sum(index(numel) for _, numel, _ in contract["shards"])
    tensors = [(index(start), index(stop)) for start, stop in contract["compress"]["tensors"][shard.index]]
    if total < shard.numel or not _is_ordered(tensors, shard.numel):
        raise ValueError

    def make() -> ServerDeltaCodec | None:
        codec = shard_codec(compressor, shard.dtype, shard.numel, total, tensors)
        return None if codec is None else ServerDeltaCodec(codec, shard.index, mode)

    return make


def _parse_shard(number: int, row: Any, contract: Contract, mode: str, alpha: float | None) -> Shard:
    dtype, numel, segments = row
    if dtype not in _DTYPES or not 0 < index(numel) <= _MAX_ELEMENTS:
        raise ValueError
    rule: UpdateRule = ElasticRule(alpha)
    if mode != "elastic":
        rule = _parse_optimizer_rule(contract["optimizer"], segments, numel)
    return Shard(number, getattr(torch, dtype), numel, rule)


def _parse_optimizer_rule(optimizer: Any, segments: Any, numel: int) -> OptimizerRule:
    spans = [(index(start), index(stop), index(group)) for start, stop, group in segments]
    fits = _is_ordered([(start, stop) for start, stop, _ in spans], numel)
    if optimizer not in OPTIMIZERS or not spans or not fits:
        raise ValueError
    if any(group < 0 for _, _, group in spans):
        raise ValueError
    return OptimizerRule(optimizer, spans)


def _is_ordered(extents: Extents, numel: int) -> bool:
    """Whether the ranges [start, stop) are ascending, disjoint and within `numel` elements."""
    ends = [0, *(stop for _, stop in extents)]
    consecutive = zip(ends, extents, strict=False)
    return all(end <= start <= stop for end, (start, stop) in consecutive) and ends[-1] <= numel
