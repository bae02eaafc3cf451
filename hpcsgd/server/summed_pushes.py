"""Pushes that are summed as words, see `hpcsgd.server.code_sum`: who says which part, and what becomes of the
sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hpcsgd.server.code_sum import ServerSum
from hpcsgd.server.protocol import Head, Kind, State
from hpcsgd.server.shard import Push, Shard


def sum_of(shard: Shard) -> ServerSum | None:
    """How pushes of a shard are summed; None: as values."""
    return None if shard.codes is None else shard.codes.sum


def may_say(shard: Shard, client: str, head: Head, clients: int) -> bool:
    """Whether a client's push, or this part of it, can be taken; of so many clients that there are."""
    summing = sum_of(shard)
    if summing is None or not head.weight:
        return True
    known = head.part == 0 or head.terms == summing.terms
    return 0 < head.terms <= clients and known and summing.takes(client, head.part)


def again(shard: Shard, number: int, terms: int) -> Head:
    """Asks for push `number` from its beginning."""
    return Head(Kind.REPLY, shard.index, State.AGAIN, round=number, terms=terms)


def is_complete(shard: Shard, counting: set[str]) -> bool:
    """Whether all have pushed, or said the next part, that are waited for."""
    summing = sum_of(shard)
    if summing is not None and summing.members:
        if summing.members & (counting | shard.waiting.keys()):
            counting = counting & summing.members
        else:
            summing.members = set()  # they are gone: what they have said is the sum of nothing
    return counting <= shard.waiting.keys()


def go_on(shard: Shard) -> tuple[dict[str, Head], np.ndarray | None]:
    """What clients are answered, and with which bytes, of whom more is waited for; nobody: all is said."""
    summing = sum_of(shard)
    assert summing is not None and shard.codes is not None
    pushes = [push for _, push in sorted(shard.waiting.items()) if push.weight]
    if pushes and not summing.members:
        others = [push for push in pushes if push.terms != len(pushes)]
        if others:
            return {push.client: again(shard, push.number, len(pushes)) for push in others}, None
        summing.begin([push.client for push in pushes], shard.codes.push_draw(shard.version))
    pushes = [push for push in pushes if push.client in summing.members]
    summing.members = {push.client for push in pushes}
    combination = summing.combine([push.values for push in pushes]) if pushes else None
    if combination is None:
        return {}, None
    more = Head(Kind.REPLY, shard.index, State.MORE, version=shard.version, nbytes=combination.nbytes)
    return {push.client: replace(more, round=push.number) for push in pushes}, combination


def add_up(shard: Shard, buffers: Mapping[str, np.ndarray]) -> list[Push]:
    """The pushes of a sum that is whole, of which the first brings the mean; and those of weight 0."""
    summing = sum_of(shard)
    assert summing is not None
    members = [push for name, push in sorted(shard.waiting.items()) if name in summing.members]
    others = [push for _, push in sorted(shard.waiting.items()) if not push.weight]
    pushes = [push._replace(weight=0.0, values=buffers[push.client][:0]) for push in members + others]
    if members:
        weight, mean = sum(push.weight for push in members), buffers[members[0].client]
        shard.view(mean).copy_(summing.end(weight))
        pushes[0] = members[0]._replace(weight=weight, values=mean)
    return pushes
