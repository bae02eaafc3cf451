"""What a client says of the model and of itself before it is let in; nothing of it is believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import index
from typing import Any, NamedTuple

import torch

from hpcsgd.compress import Compressor, Stretch, build
from hpcsgd.compress.point_to_point import Coder
from hpcsgd.mpi.world import first_difference
from hpcsgd.server.delta_coding import Extents, ServerCodes, coder_of
from hpcsgd.server.protocol import Malformed
from hpcsgd.server.shard import Shard
from hpcsgd.server.update_rules import OPTIMIZERS, Descent, Elastic, Options, Rule

_DTYPES = ("float16", "bfloat16", "float32", "float64")
_LARGEST = 2**40  # elements of a shard
_NAME, _TEXT = 200, 500  # characters, at most

Contract = Mapping[str, Any]


class Who(NamedTuple):
    """Who a client is.

    Attributes
    ----------
    name
        As it calls itself.
    talker, talkers
        Which of how many ranks that talk for its group.
    options
        Its optimizer's.
    seed
        Of the order of its data, where it has told.
    """

    name: str
    talker: int
    talkers: int
    options: Options
    seed: int | None


def who(note: Mapping[str, Any]) -> Who:
    """Who says hello; raises `Malformed` where the note does not say."""
    try:
        place, seed = (index(note["talker"]), index(note["talkers"])), note.get("seed")
        told = seed if isinstance(seed, int) and place[0] == 0 else None
        found = Who(note["client"], *place, note["options"], told)
        named = found.name.isprintable() and 0 < len(found.name) <= _NAME
        if not named or not 0 <= found.talker < found.talkers or not isinstance(found.options, list):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Malformed("its hello does not say who it is") from None
    return found


def difference(expected: Contract, contract: Contract) -> str:
    """In what a contract is not as expected; "": in nothing."""
    for name, value in expected.items():
        if contract.get(name) != value:
            got, wanted = first_difference([value, contract.get(name)])
            return f"{name} differs: expected {str(wanted)[:_TEXT]}, got {str(got)[:_TEXT]}"
    return ""


def shards_of(
    contract: Contract, mode: str, alpha: float | None, server: int, servers: int
) -> dict[int, Shard]:
    """The shards of one of some servers, by index, as a contract describes them; raises `Malformed`."""
    compressor = _compressor(contract)
    try:
        rows = list(enumerate(contract["shards"]))[server::servers]
        shards = {number: _shard(number, row, contract, mode, alpha) for number, row in rows}
        if compressor is not None:
            for shard in shards.values():
                shard.coding = _coding(compressor, contract, shard, mode)
        return shards
    except (KeyError, IndexError, TypeError, ValueError):
        raise Malformed("its hello describes no model") from None


def _compressor(contract: Contract) -> Compressor | None:
    """How pushes and answers are compressed."""
    told = contract.get("compress")
    if told is None:
        return None
    try:
        compressor = build(told["scheme"])
        if compressor is not None:
            Coder(compressor, Stretch(1, 1), torch.float32)  # raises here what it would later
    except Exception as error:
        raise Malformed(f"its compression cannot be used: {str(error)[:_TEXT]}") from None
    return compressor


def _coding(
    compressor: Compressor, contract: Contract, shard: Shard, mode: str
) -> Callable[[], ServerCodes | None]:
    total = sum(index(numel) for _, numel, _ in contract["shards"])
    tensors = [(index(start), index(stop)) for start, stop in contract["compress"]["tensors"][shard.index]]
    if total < shard.numel or not _in_order(tensors, shard.numel):
        raise ValueError

    def make() -> ServerCodes | None:
        coder = coder_of(compressor, shard.dtype, shard.numel, total, tensors)
        return None if coder is None else ServerCodes(coder, shard.index, mode)

    return make


def _shard(number: int, row: Any, contract: Contract, mode: str, alpha: float | None) -> Shard:
    dtype, numel, segments = row
    if dtype not in _DTYPES or not 0 < index(numel) <= _LARGEST:
        raise ValueError
    rule: Rule = Elastic(alpha)
    if mode != "elastic":
        rule = _descent(contract["optimizer"], segments, numel)
    return Shard(number, getattr(torch, dtype), numel, rule)


def _descent(optimizer: Any, segments: Any, numel: int) -> Descent:
    stretches = [(index(start), index(stop), index(group)) for start, stop, group in segments]
    fits = _in_order([(start, stop) for start, stop, _ in stretches], numel)
    if optimizer not in OPTIMIZERS or not stretches or not fits:
        raise ValueError
    if any(group < 0 for _, _, group in stretches):
        raise ValueError
    return Descent(optimizer, stretches)


def _in_order(extents: Extents, numel: int) -> bool:
    """Whether [start, stop) follow each other, and end within so many elements."""
    ends = [0, *(stop for _, stop in extents)]
    one_by_one = zip(ends, extents, strict=False)
    return all(end <= start <= stop for end, (start, stop) in one_by_one) and ends[-1] <= numel
