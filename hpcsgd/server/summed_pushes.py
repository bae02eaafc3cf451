"""Aggregation of pushes whose codes are summed (`hpcsgd.server.code_sum`): the sequence of their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hpcsgd.server.code_sum import CodeSumServer
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from hpcsgd.server.shard import Push, Shard


def code_sum_of(shard: Shard) -> CodeSumServer | None:
    """Code sum of a shard; None: its pushes are summed as values."""
    return None if shard.codec is None else shard.codec.code_sum


def accepts(shard: Shard, client: str, header: Header, clients: int) -> bool:
    """Whether a push, or this part of it, can be accepted now; `clients` is the number of all clients."""
    code_sum = code_sum_of(shard)
    if code_sum is None or not header.weight:
        return True
    known = header.part == 0 or header.terms == code_sum.terms
    return 0 < header.terms <= clients and known and code_sum.accepts_part(client, header.part)


def restart(shard: Shard, number: int, terms: int) -> Header:
    """Header of the request to push again from the first part on, as one of `terms` clients."""
    return Header(MessageType.REPLY, shard.index, ReplyStatus.RESTART, push_number=number, terms=terms)


def is_complete(shard: Shard, awaited: set[str]) -> bool:
    """Whether all awaited clients have pushed, or sent the next part."""
    code_sum = code_sum_of(shard)
    if code_sum is not None and code_sum.members:
        if code_sum.members & (awaited | shard.pending.keys()):
            awaited = awaited & code_sum.members
        else:
            code_sum.members = set()  # all have left: their parts belong to no sum any more
    return awaited <= shard.pending.keys()


def next_replies(shard: Shard) -> tuple[dict[str, Header], np.ndarray | None]:
    """Replies to clients that must send another part, and their body; none: the sum is complete."""
    code_sum = code_sum_of(shard)
    assert code_sum is not None and shard.codec is not None
    pushes = [push for _, push in sorted(shard.pending.items()) if push.weight]
    if pushes and not code_sum.members:
        others = [push for push in pushes if push.terms != len(pushes)]
        if others:
            return {push.client: restart(shard, push.number, len(pushes)) for push in others}, None
        code_sum.begin([push.client for push in pushes], shard.codec.push_key(shard.version))
    pushes = [push for push in pushes if push.client in code_sum.members]
    code_sum.members = {push.client for push in pushes}
    combination = code_sum.combine([push.values for push in pushes]) if pushes else None
    if combination is None:
        return {}, None
    reply = Header(
        MessageType.REPLY,
        shard.index,
        ReplyStatus.CONTINUE,
        version=shard.version,
        nbytes=combination.nbytes,
    )
    return {push.client: replace(reply, push_number=push.number) for push in pushes}, combination


def finish(shard: Shard, buffers: Mapping[str, np.ndarray]) -> list[Push]:
    """Pushes of a complete sum, of which the first holds the mean; and those of weight 0."""
    code_sum = code_sum_of(shard)
    assert code_sum is not None
    members = [push for name, push in sorted(shard.pending.items()) if name in code_sum.members]
    others = [push for _, push in sorted(shard.pending.items()) if not push.weight]
    pushes = [push._replace(weight=0.0, values=buffers[push.client][:0]) for push in members + others]
    if members:
        weight, mean = sum(push.weight for push in members), buffers[members[0].client]
        shard.view(mean).copy_(code_sum.end(weight))
        pushes[0] = members[0]._replace(weight=weight, values=mean)
    return pushes
