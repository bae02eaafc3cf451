"""Parameter server: admits clients, tracks their leases, and answers their requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hpcsgd.server import handshake, step_quota
from hpcsgd.server.aggregation import PushAggregator, RecordUpdate
from hpcsgd.server.policy import Policy
from hpcsgd.server.protocol import (
    MAX_JSON_BYTES,
    Disconnected,
    Header,
    Link,
    MessageType,
    ProtocolError,
    ReplyStatus,
    decode_json,
)
from hpcsgd.server.session import Session
from hpcsgd.server.shard import INITIAL_PUSH, Push, Shard
from hpcsgd.server.update_rules import Options, UpdateContext

_log = logging.getLogger("hpcsgd.server")
_MIN_STALL = 0.5  # seconds between two checks of the leases, below which the server itself has not stalled
_TYPES_WITH_BODY = (MessageType.PUSH, MessageType.PUSHPULL, MessageType.INIT)


class Server:
    """One server: a part of a model's shards, and the sessions of all clients.

    All work is done in `pump` and `check_leases`, which never block: no client can delay the others for
    longer than its lease.

    Parameters
    ----------
    policy
        See `Policy`.
    index, count
        Index of this server and number of servers; shard i is on server i % count.
    record
        See `aggregation.RecordUpdate`.

    Attributes
    ----------
    contract
        Contract of the first client, which the others must match, see `handshake.Contract`.
    shards, sessions
        Shards by index, and sessions by the client's name.
    step_limit, steps_begun
        Steps that all clients together may begin (None: any number), and have begun.
    pauses
        Number of pauses that clients have announced.
    messages_received
        Number of messages of clients, without heartbeats.
    """

    def __init__(
        self,
        policy: Policy,
        index: int = 0,
        count: int = 1,
        record: RecordUpdate = lambda shard, pushes, context: None,
    ) -> None:
        self.policy, self.index, self.count = policy, index, count
        self.contract: dict[str, Any] = {}
        self.shards: dict[int, Shard] = {}
        self.sessions: dict[str, Session] = {}
        self.step_limit: int | None = None
        self.steps_begun = self.pauses = self.messages_received = 0
        self._record_update = record
        self.aggregator = PushAggregator(
            self.sessions, policy.synchronous, policy.max_staleness, self._grant, record
        )
        self._leases_checked_at = time.monotonic()
        self._newcomers: list[Link] = []  # whose hello has not come
        self._sessions_by_link: dict[Link, Session] = {}
        self._handlers: dict[MessageType, Callable[[Session, Header, np.ndarray], None]] = {
            MessageType.PULL: self._handle_pull,
            MessageType.INIT: self._handle_init,
            MessageType.PUSH: self._handle_push,
            MessageType.PUSHPULL: self._handle_push,
            MessageType.OPTIONS: self._handle_options,
            MessageType.CLAIM: self._handle_claim,
            MessageType.HEARTBEAT: lambda session, header, body: None,
            MessageType.PAUSE: self._handle_pause,
            MessageType.GOODBYE: self._handle_goodbye,
        }

    # Links.

    def add_link(self, link: Link) -> None:
        """Await a client's hello on a new link, whose other side is authentic."""
        self._newcomers.append(link)

    @property
    def links(self) -> list[Link]:
        """All open links."""
        return [*self._newcomers, *self._sessions_by_link]

    def pump(self, links: Iterable[Link]) -> int:
        """Pump links; returns how many of them moved something."""
        moved = 0
        for link in links:
            try:
                moved += link.pump()
            except Disconnected as error:
                if isinstance(error, ProtocolError):  # a new attempt would fail too
                    link.send_json(MessageType.REFUSAL, {"reason": str(error)})
                    link.flush()
                self.disconnect(link, str(error))
                moved += 1
        return moved

    def disconnect(self, link: Link, reason: str) -> None:
        """Close a link; its session continues with the client's next one."""
        link.close()
        if link in self._newcomers:
            self._newcomers.remove(link)
            _log.warning("%s was not admitted: %s", link.name, reason)
        session = self._sessions_by_link.pop(link, None)
        if session is None:
            return
        session.link, session.last_seen = None, time.monotonic()
        session.received += link.received
        session.sent += link.sent
        session.pending_replies.clear()
        for shard in self.shards.values():
            shard.pending.pop(session.name, None)
        if session.done:
            self._forget(session)
            _log.info("%s is done", session.name)
        else:
            _log.warning("%s is disconnected: %s", session.name, reason)
        self._stop_awaiting(session)

    def _forget(self, session: Session) -> None:
        """Release the memory of a client that is done."""
        session.buffers.clear()
        for shard in self.shards.values():
            if shard.codec is not None:
                shard.codec.forget(session.name)

    def check_leases(self) -> None:
        """Stop awaiting clients that have been silent for longer than the lease."""
        lease = self.policy.lease
        self._extend_leases(time.monotonic() - self._leases_checked_at)
        self._leases_checked_at = time.monotonic()
        for session in self.sessions.values():
            if session.alive and not session.done and session.silent_for > lease:
                text = "%s has sent nothing for %g s (lease): it is no longer awaited"
                _log.warning(text, session.name, lease)
                self._stop_awaiting(session)
        silent = [link for link in self._newcomers if time.monotonic() - link.last_received > lease]
        for link in [link for link in silent if not link.permanent]:
            self.disconnect(link, f"the client has sent nothing for {lease:g} s")

    def _extend_leases(self, gap: float) -> None:
        """Extend all leases by the time in which the server itself was stalled and received nothing."""
        if gap > max(self.policy.lease / 4, _MIN_STALL):
            now = time.monotonic()
            for session in self.sessions.values():
                session.last_seen = min(session.last_seen + gap, now)
            for link in self.links:
                link.last_received = min(link.last_received + gap, now)

    def start_steps(self, step_limit: int | None) -> None:
        """All clients are about to take `step_limit` more steps in total: all of them are awaited."""
        self.step_limit, self.steps_begun = step_limit, 0
        for session in self.sessions.values():
            session.paused = False
            session.last_seen = time.monotonic()
            if session.link is not None:
                session.link.last_received = session.last_seen

    def _stop_awaiting(self, session: Session) -> None:
        session.alive = False
        for shard in self.shards.values():
            self.aggregator.advance(shard)

    # Messages.

    def buffer_for(self, link: Link, header: Header) -> np.ndarray:
        """Return the memory for a request's body: a buffer of its session, or a new one."""
        if header.type in (MessageType.HELLO, MessageType.OPTIONS):
            if header.nbytes > MAX_JSON_BYTES:
                raise ProtocolError(
                    f"the client sent JSON of {header.nbytes} bytes, of at most {MAX_JSON_BYTES}"
                )
            return np.empty(header.nbytes, np.uint8)
        if header.type not in _TYPES_WITH_BODY:
            raise ProtocolError(f"the client sent {header.nbytes} bytes with a {header.type.name}")
        session = self._session_of(link, header)
        shard = self._requested_shard(session, header)
        codec = None if header.type is MessageType.INIT else shard.codec
        if codec is not None and codec.accepts(header, len(self.sessions)):
            return np.empty(header.nbytes, np.uint8)
        _check_size(header.nbytes, shard)
        if header.type is not MessageType.INIT and _was_handled(session, shard, header):
            return np.empty(header.nbytes, np.uint8)  # the buffer holds its reply
        return session.buffer(shard)

    def on_message(self, link: Link, header: Header, body: np.ndarray) -> None:
        """Handle a request, or a hello."""
        if header.type is MessageType.HELLO:
            self._handle_hello(link, decode_json(body))
            return
        session = self._session_of(link, header)
        if header.type not in self._handlers:
            raise ProtocolError(f"the client sent a {header.type.name}, which only servers send")
        if not session.alive:
            session.alive = True
            _log.warning("%s has sent a message again: it is awaited again", session.name)
        self.messages_received += header.type is not MessageType.HEARTBEAT
        self._handlers[header.type](session, header, body)

    def _session_of(self, link: Link, header: Header) -> Session:
        session = self._sessions_by_link.get(link)
        if session is None:
            raise ProtocolError(f"the client sent a {header.type.name} before it was admitted")
        return session

    def _requested_shard(self, session: Session, header: Header) -> Shard:
        if header.shard not in session.shards:
            raise ProtocolError(
                f"the client sent a {header.type.name} for shard {header.shard}, which is not its own"
            )
        if header.shard in session.pending_replies:
            raise ProtocolError(
                f"the client sent a {header.type.name} for shard {header.shard} before the last reply"
            )
        return self.shards[header.shard]

    def _handle_hello(self, link: Link, fields: dict[str, Any]) -> None:
        if link not in self._newcomers:
            raise ProtocolError("the client sent a second HELLO")
        session = self._admit(link, fields)
        self._newcomers.remove(link)
        self._sessions_by_link[link] = session
        link.send_json(MessageType.WELCOME, {"lease": self.policy.lease})

    def set_contract(self, contract: dict[str, Any]) -> None:
        """Create the shards that a contract describes."""
        policy = self.policy
        self.shards = handshake.make_shards(contract, policy.mode, policy.alpha, self.index, self.count)
        self.contract = contract

    def _admit(self, link: Link, fields: dict[str, Any]) -> Session:
        identity, contract = handshake.parse_identity(fields), fields.get("contract")
        if not isinstance(contract, dict):
            raise ProtocolError(
                "the client's hello message has no contract (description of model and options)"
            )
        server = {"mode": self.policy.mode, "servers": self.count}
        mismatch = handshake.first_mismatch({**server, **(self.contract if self.sessions else {})}, contract)
        if mismatch:
            raise ProtocolError(mismatch)
        if not self.sessions:
            self.set_contract(contract)
        name, gateway, gateways, options, seed = identity
        shards = frozenset(i for i in self.shards if (i // self.count) % gateways == gateway)
        session = self.sessions.get(name)
        if session is None or (session.options, session.shards) != (options, shards):
            self._validate_options(options, shards)  # by an optimizer, which takes time to be made
        if session is None:
            session = self.sessions[name] = Session(name, link, shards, options)
            _log.info("%s has connected, from %s", name, link.name)
        else:
            self._reconnect(session, link)
        session.link, session.shards, session.options, session.done = link, shards, options, False
        session.subscribed &= shards
        session.seed = seed
        return session

    def _reconnect(self, session: Session, link: Link) -> None:
        if session.link is not None:
            self.disconnect(session.link, "the client has opened another connection")
        else:
            _log.info("%s has reconnected, from %s", session.name, link.name)
        for shard in self.shards.values():
            if shard.codec is not None:
                shard.codec.on_reconnect(session.name)

    def _validate_options(self, options: Options, shards: Iterable[int]) -> None:
        # One shard for each type and set of parameter groups is enough: the others have equal rules.
        owned_shards = [self.shards[i] for i in shards]
        distinct = {(shard.dtype, shard.rule.parameter_groups): shard for shard in owned_shards}
        for shard in distinct.values():
            try:
                shard.rule.validate(options, shard.dtype)
            except Exception as error:
                raise ProtocolError(f"the client's optimizer rejects these options: {error!r}") from None

    def _handle_pull(self, session: Session, header: Header, body: np.ndarray) -> None:
        joins = bool(header.steps)
        if joins:
            session.paused = False
        self.aggregator.pull(session, self._requested_shard(session, header), joins)

    def _handle_init(self, session: Session, header: Header, body: np.ndarray) -> None:
        shard = self._requested_shard(session, header)
        if shard.centre is None:
            _check_size(body.nbytes, shard)
            first = Push(session.name, INITIAL_PUSH, 0.0, body)
            self._record_update(shard, [first], UpdateContext([], 0, []))
            shard.initialize(first.values)
        self.aggregator.pull(session, shard)

    def _handle_push(self, session: Session, header: Header, body: np.ndarray) -> None:
        session.paused = False
        shard = self._requested_shard(session, header)
        if shard.centre is None or header.push_number < 1:
            raise ProtocolError(f"the client pushed shard {shard.index} before its values were initialized")
        values = self._decode(session, shard, header, body)
        if values is not None:
            self.aggregator.push(session, shard, header, values)
        elif session.link is not None:
            status, number = ReplyStatus.NO_REFERENCE, header.push_number
            session.link.send(Header(MessageType.REPLY, shard.index, status, push_number=number))

    def _decode(self, session: Session, shard: Shard, header: Header, body: np.ndarray) -> np.ndarray | None:
        """Values of a push, or part of a code sum; None: it is a difference to an unknown reference."""
        codec = shard.codec
        if codec is None or not codec.accepts(header, len(self.sessions)):
            if codec is not None and codec.code_sum is not None:
                raise ProtocolError(f"the client sent {body.nbytes} bytes as part {header.part} of a push")
            _check_size(body.nbytes, shard)
        if codec is None or codec.code_sum is not None or _was_handled(session, shard, header):
            return body  # the values of a push that was handled before are not used
        values = session.buffer(shard)
        try:
            decoded = codec.decode_push(session.name, header.push_number, body, shard.view(values))
            return values if decoded else None
        except Exception as error:
            raise ProtocolError(f"the client sent an invalid code: {error!r}") from None

    def _handle_options(self, session: Session, header: Header, body: np.ndarray) -> None:
        options = decode_json(body).get("options")
        if not isinstance(options, list) or len(options) != len(session.options):
            raise ProtocolError("the client's options do not match the parameter groups of its optimizer")
        self._validate_options(options, session.shards)
        session.options = options

    def _handle_claim(self, session: Session, header: Header, body: np.ndarray) -> None:
        session.paused = False
        assert session.link is not None
        session.quota = 0
        steps, steps_begun = self._grant(session, header.steps)
        session.link.send(Header(MessageType.GRANT, steps=steps, steps_begun=steps_begun))

    def _grant(self, session: Session, steps: int) -> tuple[int, int]:
        if self.step_limit is not None:
            remaining = self.step_limit - self.steps_begun
            if self.policy.synchronous:  # all clients take the same number of steps
                steps = min(steps, remaining)
            else:
                steps = step_quota.grant(session, steps, remaining, self.sessions.values())
        step_quota.record(session, steps)
        self.steps_begun += steps
        return steps, self.steps_begun

    def _handle_pause(self, session: Session, header: Header, body: np.ndarray) -> None:
        session.paused = True
        self.pauses += 1
        for shard in self.shards.values():
            self.aggregator.advance(shard)

    def _handle_goodbye(self, session: Session, header: Header, body: np.ndarray) -> None:
        session.done = True
        link = session.link
        assert link is not None
        link.send(Header(MessageType.GOODBYE))
        link.flush()
        raise Disconnected("the client is done")


def _was_handled(session: Session, shard: Shard, header: Header) -> bool:
    """Whether this push was applied or dropped before: its reply was lost."""
    return header.push_number <= shard.last_pushes.get(session.name, 0)


def _check_size(nbytes: int, shard: Shard) -> None:
    if nbytes != shard.nbytes:
        raise ProtocolError(
            f"the client sent {nbytes} bytes for shard {shard.index}, which has {shard.nbytes}"
        )
