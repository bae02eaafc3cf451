"""What a client says of the model and of itself before it is let in; nothing of it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from operator import index
from typing import Any, NamedTuple

import torch

from hpcsgd.links import Malformed
from hpcsgd.server.rules import OPTIMIZERS, Descent, Elastic, Options, Rule
from hpcsgd.server.shard import Shard
from hpcsgd.world import first_difference

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
    try:
        rows = list(enumerate(contract["shards"]))[server::servers]
        return {number: _shard(number, row, contract, mode, alpha) for number, row in rows}
    except (KeyError, TypeError, ValueError):
        raise Malformed("its hello describes no model") from None


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
    ends = [0, *(stop for _, stop, _ in stretches)]
    fits = all(end <= start <= stop for end, (start, stop, _) in zip(ends, stretches, strict=False))
    if optimizer not in OPTIMIZERS or not stretches or not fits or ends[-1] > numel:
        raise ValueError
    if any(group < 0 for _, _, group in stretches):
        raise ValueError
    return Descent(optimizer, stretches)
