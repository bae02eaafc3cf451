"""The parameter server: who is let in, who is heard, and who is waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from hpcsgd.server import handshake as agreed
from hpcsgd.server import step_quota, tcp_link
from hpcsgd.server.aggregation import Counting, Record
from hpcsgd.server.protocol import NOTES, Head, Kind, Link, Lost, Malformed, State, read_note
from hpcsgd.server.session import Client
from hpcsgd.server.shard import FIRST, Push, Shard
from hpcsgd.server.update_rules import Options, Terms

_log = logging.getLogger("hpcsgd.server")
_STILL = 0.5  # seconds between two looks at the clock that are no accident
_BODIES = (Kind.PUSH, Kind.PUSHPULL, Kind.FILL)


class Policy(NamedTuple):
    """What all servers of a model do alike.

    Attributes
    ----------
    mode
        "sync": an optimizer's step with the mean gradient of all clients that count. "async": one with each
        push. "elastic": pushes are models, which are drawn to the values and these to them.
    alpha
        Of the elastic rule, see `rules.Elastic`.
    max_staleness
        See `counting.Counting`; with 0 any mode waits for the pushes of all and counts them in together.
    lease
        Seconds of silence after which a client counts no more, until it is heard again.
    secret
        What clients must know; "": nothing.
    """

    mode: str = "sync"
    alpha: float | None = None
    max_staleness: int | None = None
    lease: float = 10.0
    secret: str = ""

    @property
    def together(self) -> bool:
        """Whether pushes are counted in together."""
        return self.mode == "sync" or self.max_staleness == 0


class Server:
    """Some of a model's shards, and the links of all clients.

    Everything happens in `pump` and `watch`, which never wait: nothing that a client does, or fails to do,
    holds up the others for longer than its lease.

    Parameters
    ----------
    policy
        See `Policy`.
    index, count
        Which of how many servers this is; shard i is that of server i % count.
    record
        See `counting.Record`.

    Attributes
    ----------
    contract
        What the first client has said of the model; the others must say the same.
    shards, clients
        By index, and by name.
    goal, begun
        How many steps all clients together may begin, None: any number; and have begun.
    rests
        How many times a client has said that it rests.
    heard
        How many messages have come, but for those that only say that a client is still there.
    """

    def __init__(
        self,
        policy: Policy,
        index: int = 0,
        count: int = 1,
        record: Record = lambda shard, pushes, terms: None,
    ) -> None:
        self.policy, self.index, self.count = policy, index, count
        self.contract: dict[str, Any] = {}
        self.shards: dict[int, Shard] = {}
        self.clients: dict[str, Client] = {}
        self.goal: int | None = None
        self.begun = self.rests = self.heard = 0
        self._record = record
        self.counting = Counting(self.clients, policy.together, policy.max_staleness, self._grant, record)
        self._watched = time.monotonic()
        self._strangers: dict[Link, str] = {}  # and the nonces they were given
        self._owners: dict[Link, Client] = {}
        self._handlers: dict[Kind, Callable[[Client, Head, np.ndarray], None]] = {
            Kind.PULL: self._pull,
            Kind.FILL: self._fill,
            Kind.PUSH: self._push,
            Kind.PUSHPULL: self._push,
            Kind.OPTIONS: self._take_options,
            Kind.CLAIM: self._claim,
            Kind.BEAT: lambda client, head, body: None,
            Kind.REST: self._rest,
            Kind.BYE: self._bye,
        }

    # Links.

    def add(self, link: Link) -> None:
        """Somebody, still unknown, has connected."""
        self._strangers[link] = tcp_link.new_secret()
        link.send_note(Kind.CHALLENGE, {"nonce": self._strangers[link]})

    @property
    def links(self) -> list[Link]:
        """All that are open."""
        return [*self._strangers, *self._owners]

    def pump(self, links: Iterable[Link]) -> int:
        """Let links move what can be moved; returns how many moved something."""
        moved = 0
        for link in links:
            try:
                moved += link.pump()
            except Lost as error:
                if isinstance(error, Malformed):  # to try again would be of no use
                    link.send_note(Kind.REFUSAL, {"reason": str(error)})
                    link.flush()
                self.lose(link, str(error))
                moved += 1
        return moved

    def lose(self, link: Link, why: str) -> None:
        """A link is of no use any more."""
        link.close()
        if self._strangers.pop(link, None) is not None:
            _log.warning("%s was not let in: %s", link.name, why)
        client = self._owners.pop(link, None)
        if client is None:
            return
        client.link, client.since = None, time.monotonic()
        client.received += link.received
        client.sent += link.sent
        client.owed.clear()
        for shard in self.shards.values():
            shard.waiting.pop(client.name, None)
            if shard.codes is not None:
                shard.codes.forget(client.name)
        if client.done:
            client.buffers.clear()
            _log.info("%s is done", client.name)
        else:
            _log.warning("%s is gone: %s", client.name, why)
        self._leave_out(client)

    def watch(self) -> None:
        """Wait no longer for who has been silent for too long."""
        lease = self.policy.lease
        self._make_up_for(time.monotonic() - self._watched)
        self._watched = time.monotonic()
        for client in self.clients.values():
            if client.waited_for and not client.done and client.silent_for > lease:
                text = "%s has been silent for %g s: nobody waits for it any more"
                _log.warning(text, client.name, lease)
                self._leave_out(client)
        mute = [link for link in self._strangers if time.monotonic() - link.heard > lease]
        for link in [link for link in mute if not link.lasting]:
            self.lose(link, f"it said nothing for {lease:g} s")

    def _make_up_for(self, gap: float) -> None:
        """Who has not been listened to, because the server itself stood still, was not silent."""
        if gap > max(self.policy.lease / 4, _STILL):
            for client in self.clients.values():
                client.since += gap
            for link in self.links:
                link.heard = min(link.heard + gap, time.monotonic())

    def begin(self, goal: int | None) -> None:
        """All clients are about to take steps, so many more in all: none may go on without the others."""
        self.goal, self.begun = goal, 0
        for client in self.clients.values():
            client.resting = False
            client.since = time.monotonic()
            if client.link is not None:
                client.link.heard = client.since

    def _leave_out(self, client: Client) -> None:
        client.waited_for = False
        for shard in self.shards.values():
            self.counting.go_on(shard)

    # What comes over them.

    def landing(self, link: Link, head: Head) -> np.ndarray:
        """See `links.Party`."""
        if head.kind in (Kind.HELLO, Kind.OPTIONS):
            if head.nbytes > NOTES:
                raise Malformed(f"it sent a note of {head.nbytes} bytes, of at most {NOTES}")
            return np.empty(head.nbytes, np.uint8)
        if head.kind not in _BODIES:
            raise Malformed(f"it sent {head.nbytes} bytes with a {head.kind.name}")
        client = self._owner(link, head)
        shard = self._shard(client, head)
        codes = None if head.kind is Kind.FILL else shard.codes
        if codes is not None and codes.takes(head, len(self.clients)):
            return np.empty(head.nbytes, np.uint8)
        if head.nbytes != shard.nbytes:
            raise Malformed(f"it sent {head.nbytes} bytes for shard {shard.index}, which has {shard.nbytes}")
        if head.kind is not Kind.FILL and head.round <= shard.rounds.get(client.name, 0):
            return np.empty(head.nbytes, np.uint8)  # it has been counted in; its answer is in the buffer
        return client.buffer(shard)

    def take(self, link: Link, head: Head, body: np.ndarray) -> None:
        """See `links.Party`."""
        if head.kind is Kind.HELLO:
            self._greet(link, read_note(body))
            return
        client = self._owner(link, head)
        if head.kind not in self._handlers:
            raise Malformed(f"it sent a {head.kind.name}, which is for servers alone")
        if not client.waited_for:
            client.waited_for = True
            _log.warning("%s is back", client.name)
        self.heard += head.kind is not Kind.BEAT
        self._handlers[head.kind](client, head, body)

    def _owner(self, link: Link, head: Head) -> Client:
        client = self._owners.get(link)
        if client is None:
            raise Malformed(f"it sent a {head.kind.name} before it was let in")
        return client

    def _shard(self, client: Client, head: Head) -> Shard:
        if head.shard not in client.shards:
            raise Malformed(f"it sent a {head.kind.name} of shard {head.shard}, which is not its own")
        if head.shard in client.owed:
            raise Malformed(f"it sent a {head.kind.name} of shard {head.shard} before the last was answered")
        return self.shards[head.shard]

    def _greet(self, link: Link, note: dict[str, Any]) -> None:
        nonce = self._strangers.get(link)
        if nonce is None:
            raise Malformed("it said hello twice")
        if not tcp_link.proves(self.policy.secret, nonce, note.get("proof")):
            raise Malformed("it does not know the secret of this job")
        client = self._admit(link, note)
        del self._strangers[link]
        self._owners[link] = client
        link.send_note(
            Kind.WELCOME,
            {"proof": tcp_link.proof(self.policy.secret, str(note.get("nonce"))), "lease": self.policy.lease},
        )

    def agree_on(self, contract: dict[str, Any]) -> None:
        """Make the shards that a contract describes."""
        policy = self.policy
        self.shards = agreed.shards_of(contract, policy.mode, policy.alpha, self.index, self.count)
        self.contract = contract

    def _admit(self, link: Link, note: dict[str, Any]) -> Client:
        who, contract = agreed.who(note), note.get("contract")
        if not isinstance(contract, dict):
            raise Malformed("its hello says nothing of the model")
        own = {"mode": self.policy.mode, "servers": self.count}
        objection = agreed.difference({**own, **(self.contract if self.clients else {})}, contract)
        if objection:
            raise Malformed(objection)
        if not self.clients:
            self.agree_on(contract)
        shards = frozenset(i for i in self.shards if (i // self.count) % who.talkers == who.talker)
        self._try_out(who.options, shards)
        client = self.clients.get(who.name)
        if client is None:
            client = self.clients[who.name] = Client(who.name, link, shards, who.options)
            _log.info("%s has come, from %s", who.name, link.name)
        elif client.link is not None:
            self.lose(client.link, "it has connected anew")
        else:
            _log.info("%s has connected again, from %s", who.name, link.name)
        client.link, client.shards, client.options, client.done = link, shards, who.options, False
        client.has &= shards
        client.seed = who.seed
        return client

    def _try_out(self, options: Options, shards: Iterable[int]) -> None:
        # One shard of each kind is enough: the others' rules are alike.
        kinds = {(self.shards[i].dtype, self.shards[i].rule.groups): self.shards[i] for i in shards}
        for shard in kinds.values():
            try:
                shard.rule.try_out(options, shard.dtype)
            except Exception as error:
                raise Malformed(f"its optimizer does not take these options: {error!r}") from None

    def _pull(self, client: Client, head: Head, body: np.ndarray) -> None:
        if head.steps:
            client.resting = False
        self.counting.pull(client, self._shard(client, head))

    def _fill(self, client: Client, head: Head, body: np.ndarray) -> None:
        shard = self._shard(client, head)
        if shard.centre is None:
            first = Push(client.name, FIRST, 0.0, _whole(head, shard, body))
            self._record(shard, [first], Terms([], 0, []))
            shard.fill(first.values)
        self.counting.pull(client, shard)

    def _push(self, client: Client, head: Head, body: np.ndarray) -> None:
        client.resting = False
        shard = self._shard(client, head)
        if shard.centre is None or head.round < 1:
            raise Malformed(f"it pushed shard {shard.index} before it had its values")
        values = self._read(client, shard, head, body)
        if values is not None:
            self.counting.push(client, shard, head, values)
        elif client.link is not None:
            client.link.send(Head(Kind.REPLY, shard.index, State.UNREAD, round=head.round))

    def _read(self, client: Client, shard: Shard, head: Head, body: np.ndarray) -> np.ndarray | None:
        """What was pushed; None: this cannot be read."""
        codes = shard.codes
        if codes is None or not codes.takes(head, len(self.clients)):
            if codes is not None and codes.sum is not None:
                raise Malformed(f"it sent {body.nbytes} bytes as part {head.part} of a push")
            body = _whole(head, shard, body)
        if codes is None or codes.sum is not None or head.round <= shard.rounds.get(client.name, 0):
            return body  # of what has been counted in nobody looks at the values
        values = client.buffer(shard)
        try:
            return values if codes.hear(client.name, head.round, body, shard.view(values)) else None
        except Exception as error:
            raise Malformed(f"it sent a code that cannot be read: {error!r}") from None

    def _take_options(self, client: Client, head: Head, body: np.ndarray) -> None:
        options = read_note(body).get("options")
        if not isinstance(options, list) or len(options) != len(client.options):
            raise Malformed("its options are not those of its optimizer")
        self._try_out(options, client.shards)
        client.options = options

    def _claim(self, client: Client, head: Head, body: np.ndarray) -> None:
        client.resting = False
        assert client.link is not None
        client.leave = 0
        steps, begun = self._grant(client, head.steps)
        client.link.send(Head(Kind.GRANT, steps=steps, begun=begun))

    def _grant(self, client: Client, steps: int) -> tuple[int, int]:
        if self.goal is not None:
            left = self.goal - self.begun
            # Where all exchange at the same time they take equally many.
            alike = self.policy.together
            steps = (
                min(steps, left) if alike else step_quota.share(client, steps, left, self.clients.values())
            )
        step_quota.note(client, steps)
        self.begun += steps
        return steps, self.begun

    def _rest(self, client: Client, head: Head, body: np.ndarray) -> None:
        client.resting = True
        self.rests += 1
        for shard in self.shards.values():
            self.counting.go_on(shard)

    def _bye(self, client: Client, head: Head, body: np.ndarray) -> None:
        client.done = True
        link = client.link
        assert link is not None
        link.send(Head(Kind.BYE))
        link.flush()
        raise Lost("it is done")


def _whole(head: Head, shard: Shard, body: np.ndarray) -> np.ndarray:
    if body.nbytes != shard.nbytes:
        raise Malformed(f"it sent {body.nbytes} bytes for shard {shard.index}, which has {shard.nbytes}")
    return body
