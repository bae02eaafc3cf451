"""Aggregation of pushes: when updates are made and replies sent, and which pushes are dropped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hpcsgd.server import summed_pushes
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from hpcsgd.server.session import Session
from hpcsgd.server.shard import Push, Shard
from hpcsgd.server.update_rules import UpdateContext

#: Called with the pushes of an update before it is made, so that a record of it can survive the server.
RecordUpdate = Callable[[Shard, list[Push], UpdateContext], None]


class PushAggregator:
    """Applies pushes to shards, one by one or all clients' at once, and replies to them.

    Parameters
    ----------
    sessions
        Sessions of all clients that have ever connected, by name.
    synchronous
        Whether an update waits for the pushes of all awaited clients, and is made from all of them at once.
    max_staleness
        Pushes by which a client may be ahead of the slowest awaited one: later replies are delayed (stale
        synchronous parallel, SSP). None: any number.
    grant
        Returns the granted steps for a client's request, and the steps begun by all clients.
    record
        See `RecordUpdate`.

    Attributes
    ----------
    staleness
        Histogram: number of pushes by the number of updates of others that they had missed.
    dropped
        Number of gradients that came too late and were not applied.
    """

    def __init__(
        self,
        sessions: dict[str, Session],
        synchronous: bool,
        max_staleness: int | None,
        grant: Callable[[Session, int], tuple[int, int]],
        record: RecordUpdate,
    ) -> None:
        self._sessions, self._synchronous, self._max_staleness = sessions, synchronous, max_staleness
        self._grant, self._record_update = grant, record
        self.staleness: Counter[int] = Counter()
        self.dropped = 0

    def pull(self, session: Session, shard: Shard, joins: bool = False) -> None:
        """Reply with the values of a shard, if it has any; a client that `joins` trains with them."""
        reply = Header(MessageType.REPLY, shard.index, ReplyStatus.NO_VALUES)
        if shard.centre is not None:
            self.subscribe(session, shard)
            reply = Header(MessageType.REPLY, shard.index, version=shard.version, nbytes=shard.nbytes)
        self._reply(session, shard, reply, joins)

    def push(self, session: Session, shard: Shard, header: Header, values: np.ndarray) -> None:
        """Apply a push, now or when the awaited clients have pushed too."""
        self.subscribe(session, shard)
        nbytes = shard.nbytes if header.type is MessageType.PUSHPULL else 0
        number = header.push_number
        reply = Header(MessageType.REPLY, shard.index, push_number=number, steps=header.steps, nbytes=nbytes)
        if number <= shard.last_pushes.get(session.name, 0):
            pass  # it has been received before, and the reply was lost
        elif self._is_late(session, shard, header):
            self._drop_late(session, shard, number)
        else:
            shard.dropped.discard(session.name)
            if summed_pushes.accepts(shard, session.name, header, len(self._sessions)):
                staleness = max(0, shard.version - header.version)
                push = Push(session.name, number, header.weight, values, header.terms, staleness)
                shard.pending[session.name] = push
            else:
                reply = summed_pushes.restart(shard, number, len(self._awaited(shard)))
        if session.name in shard.dropped:
            reply = replace(reply, status=ReplyStatus.LATE)
        session.pending_replies[shard.index] = reply
        self.advance(shard)

    def _drop_late(self, session: Session, shard: Shard, number: int) -> None:
        self.dropped += 1
        session.dropped += 1
        shard.last_pushes[session.name] = number
        shard.dropped.add(session.name)

    def advance(self, shard: Shard) -> None:
        """Apply pushes and send replies that need not wait any longer."""
        if not self._synchronous:
            for name in list(shard.pending):
                self._apply(shard, [shard.pending[name]])
        elif shard.pending and summed_pushes.is_complete(
            shard, {session.name for session in self._awaited(shard)}
        ):
            if summed_pushes.code_sum_of(shard) is not None:
                self._advance_sum(shard)
            else:
                # In the order of names: the bits do not depend on the order of arrival.
                self._apply(shard, [shard.pending[name] for name in sorted(shard.pending)])
        self._send_replies(shard)

    def _advance_sum(self, shard: Shard) -> None:
        """Continue or finish a code sum, for which all awaited parts are here."""
        replies, body = summed_pushes.next_replies(shard)
        for name, reply in replies.items():
            session = self._sessions[name]
            del shard.pending[name], session.pending_replies[shard.index]
            if session.link is not None:
                session.link.send(reply, body, 0)
        if not replies:
            buffers = {name: self._sessions[name].buffer(shard) for name in shard.pending}
            self._apply(shard, summed_pushes.finish(shard, buffers))
            for name in list(shard.pending):  # clients that joined during the sum begin with the new values
                session, push = self._sessions[name], shard.pending.pop(name)
                self._drop_late(session, shard, push.number)
                late = replace(session.pending_replies[shard.index], status=ReplyStatus.LATE)
                session.pending_replies[shard.index] = late

    def _awaited(self, shard: Shard) -> list[Session]:
        """Sessions whose pushes to a shard are awaited."""
        return [s for s in self._sessions.values() if s.is_awaited and shard.index in s.subscribed]

    def subscribe(self, session: Session, shard: Shard) -> None:
        """Record that a client has a shard's values; its clock becomes that of the most advanced client."""
        if shard.index not in session.subscribed:
            session.subscribed.add(shard.index)
            shard.clocks.setdefault(session.name, self._max_other_clock(session, shard))

    def _max_other_clock(self, session: Session, shard: Shard) -> int:
        # Clients that have left are included: their pushes make this client's no less late.
        return max((clock for name, clock in shard.clocks.items() if name != session.name), default=0)

    def _is_late(self, session: Session, shard: Shard, header: Header) -> bool:
        """Whether the other clients have advanced too far without this push, and it is a gradient."""
        if self._synchronous:
            late = header.version != shard.version
        elif self._max_staleness is None:
            late = False
        else:
            ahead = self._max_other_clock(session, shard)
            late = ahead > shard.clocks[session.name] + self._max_staleness + 1
            if late:  # it continues with their clock: the others do not wait until it has caught up
                shard.clocks[session.name] = ahead
        return late and shard.rule.takes_gradients

    def _apply(self, shard: Shard, pushes: list[Push]) -> None:
        for push in pushes:
            del shard.pending[push.client]
        clients = max(len(pushes), len(self._awaited(shard)))
        options = self._sessions[pushes[0].client].options
        context = UpdateContext([push.weight for push in pushes], clients, options)
        self._record_update(shard, pushes, context)
        shard.apply(pushes, context)
        self.count(pushes)

    def count(self, pushes: list[Push]) -> None:
        """Add applied pushes to the histograms of the staleness."""
        for push in pushes:
            self._sessions[push.client].staleness[push.staleness] += 1
            self.staleness[push.staleness] += 1

    def _send_replies(self, shard: Shard) -> None:
        """Reply to pushes that have been applied, unless their clients are too far ahead."""
        bounded = not self._synchronous and self._max_staleness is not None
        slowest = min((shard.clocks[session.name] for session in self._awaited(shard)), default=math.inf)
        for session in self._sessions.values():
            if shard.index not in session.pending_replies or session.name in shard.pending:
                continue
            if bounded and shard.clocks[session.name] - slowest > (self._max_staleness or 0):
                continue
            reply = session.pending_replies.pop(shard.index)
            self._reply(session, shard, replace(reply, version=shard.version))

    def _reply(self, session: Session, shard: Shard, reply: Header, joins: bool = False) -> None:
        if session.link is None:
            return
        body, code = session.buffer(shard), None
        if reply.nbytes and (shard.rule.takes_gradients or not reply.push_number):
            shard.copy_to(body)
        if reply.nbytes and joins and shard.codec is not None:
            shard.codec.continue_from_reference(session.name, shard.version, shard.view(body))
        if reply.nbytes and reply.push_number and shard.codec is not None:
            code = shard.codec.encode_reply(session.name, reply, shard.view(body))
        if code is not None:
            body, reply = code, replace(reply, nbytes=code.nbytes)
        if reply.steps:
            steps, steps_begun = self._grant(session, reply.steps)
            reply = replace(reply, steps=steps, steps_begun=steps_begun)
        session.link.send(reply, body if reply.nbytes else None, shard.nbytes if code is not None else None)
