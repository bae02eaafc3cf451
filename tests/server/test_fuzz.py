"""Protocol under clients that send anything: the server stands, and who keeps to the protocol is served."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from hpcsgd.server import Policy, Server, handshake
from hpcsgd.server.protocol import HEADER_BYTES, Header, MessageType, ReplyStatus
from hpcsgd.server.shard import Push, Shard
from hpcsgd.server.tcp_link import TCPLink
from hpcsgd.server.update_rules import UpdateContext
from tests.support.coding_clients import SIZE, CodingClient, contract_with_compression, random_values
from tests.support.flaky_links import StreamEnd
from tests.support.protocol_clients import json_body

NUMBERS = st.one_of(st.integers(0, 3), st.sampled_from([2**31, 2**32 - 1]))
LARGE = st.one_of(st.integers(0, 5), st.sampled_from([-1, 2**40, 2**40 + 1, 2**62]))
WEIGHTS = st.sampled_from([0.0, 1.0, 0.5, 1e300, -1.0, math.nan, math.inf])
SIZES = st.one_of(st.integers(0, 8), st.sampled_from([4 * SIZE, 4 * SIZE - 1, 63, 64, 2**20, 2**22, 2**40]))
HEADERS = st.builds(
    Header,
    type=st.sampled_from(MessageType),
    shard=NUMBERS,
    status=st.sampled_from(ReplyStatus),
    push_number=LARGE,
    version=LARGE,
    weight=WEIGHTS,
    steps=LARGE,
    steps_begun=LARGE,
    nbytes=SIZES,
    part=st.sampled_from([0, 0, 1, 2, 65535]),
    terms=st.sampled_from([0, 1, 1, 2, 3, 2**32 - 1]),
)
JUNK = st.one_of(st.none(), st.booleans(), LARGE, st.floats(), st.text(max_size=5), st.just([]), st.just({}))
FIELDS = ("client", "talker", "talkers", "contract", "options", "seed")
CHANGES = st.one_of(st.just({}), st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=2))


class Enemy:
    """A client that has proved the secret, and sends bytes as it likes."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self.own_end, self.end = StreamEnd.pair(2**62, 2**30)
        self.link = TCPLink(self.end, server, name)  # type: ignore[arg-type]
        server.add_link(self.link)

    def send(self, data: bytes) -> None:
        self.end.incoming += data
        if self.link in self.server.links:
            self.server.pump([self.link])
        assert self.end.closed == (self.link not in self.server.links)
        self.own_end.incoming.clear()

    def vanish(self) -> None:
        self.own_end.closed = True
        self.send(b"")


class Protocol(RuleBasedStateMachine):
    """One client that keeps to the protocol among enemies, which share its secret but not its name."""

    spec, mode = "bf16", "sync"
    enemies: Bundle[Enemy] = Bundle("enemies")
    messages: Bundle[bytes] = Bundle("messages")

    @initialize()
    def begin(self) -> None:
        self.updates: list[tuple[int, list[Push], UpdateContext]] = []
        self.server = Server(Policy(self.mode, 0.25), record=self.record)
        self.contract = contract_with_compression(self.spec, self.mode, [SIZE])
        self.good = CodingClient(self.server, "good", self.spec)
        self.good.pull_model(np.zeros(SIZE, np.float32))
        self.server.start_steps(None)
        self.met: list[Enemy] = []

    def record(self, shard: Shard, pushes: list[Push], context: UpdateContext) -> None:
        self.updates.append((shard.index, [p._replace(values=p.values.copy()) for p in pushes], context))

    # Enemies.

    @rule(target=enemies)
    def enter(self) -> Enemy:
        self.met.append(Enemy(self.server, f"enemy {len(self.met)}"))
        return self.met[-1]

    @rule(target=enemies, changes=CHANGES, name=st.integers(0, 2))
    def enter_with_hello(self, changes: dict[str, Any], name: int) -> Enemy:
        enemy = self.enter()
        fields = {"client": f"e{name}", "talker": 0, "talkers": 1, "contract": self.contract}
        body = json_body({**fields, "options": [{"lr": 0.1}], **changes}).tobytes()
        enemy.send(Header(MessageType.HELLO, nbytes=len(body)).pack() + body)
        return enemy

    @rule(target=messages, enemy=enemies, header=HEADERS, body=st.binary(max_size=8), cut=st.integers(0, 200))
    def send_message(self, enemy: Enemy, header: Header, body: bytes, cut: int) -> bytes:
        nbytes = min(header.nbytes, 2**20)
        data = header.pack() + (body * nbytes)[:nbytes].ljust(nbytes)
        enemy.send(data if cut > 100 else data[:cut])
        return data

    @rule(enemy=enemies, first=messages, second=messages)
    def send_again_in_any_order(self, enemy: Enemy, first: bytes, second: bytes) -> None:
        enemy.send(first + second + first)

    @rule(enemy=enemies, data=messages, place=st.integers(0, HEADER_BYTES - 1), flip=st.integers(1, 255))
    def send_with_a_flipped_byte(self, enemy: Enemy, data: bytes, place: int, flip: int) -> None:
        enemy.send(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])

    @rule(target=messages, values=st.integers(0, 5), enemy=enemies, number=st.integers(1, 4), weight=WEIGHTS)
    def push_as_a_client(self, values: int, enemy: Enemy, number: int, weight: float) -> bytes:
        """A push that is valid in all but, at times, its number or its weight."""
        body = random_values(values).tobytes()
        version = self.server.shards[0].version
        header = Header(
            MessageType.PUSHPULL,
            push_number=number,
            version=version,
            weight=weight,
            nbytes=len(body),
            terms=1,
        )
        enemy.send(header.pack() + body)
        return header.pack() + body

    @rule(enemy=enemies, data=st.binary(max_size=300))
    def send_bytes(self, enemy: Enemy, data: bytes) -> None:
        enemy.send(data)

    @rule(enemy=enemies)
    def vanish(self, enemy: Enemy) -> None:
        enemy.vanish()

    # The good client.

    @rule(
        target=messages, seed=st.integers(0, 99), lost=st.sampled_from(["", "", "push", "reply", "replies"])
    )
    def push(self, seed: int, lost: str) -> bytes:
        """It is answered at once or after the lease of those that are awaited, over a new link too."""
        good, answered = self.good, len(self.good.replies)
        if lost == "push":
            good.link.close()
        good.push_values(None if self.mode == "elastic" else random_values(seed))
        assert good.request is not None and good.request.source is not None
        data = good.request.header.pack() + good.request.source.tobytes()
        for attempt in range(14):
            if lost and attempt < 1 + (lost == "replies"):
                good.disconnect()
                good.reconnect()
            good.receive_replies(1)
            if good.request is None:
                break
            for enemy in self.met:
                enemy.link.last_received = -math.inf
            self.server.check_leases()
        assert len(good.replies) == answered + 1 and good.admitted
        late = {ReplyStatus.LATE} if lost and self.mode == "sync" else set()
        assert good.replies[-1][0] in {ReplyStatus.OK, *late}
        return data

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        numbers = [p.number for _, pushes, _ in self.updates for p in pushes if p.client == "good"]
        statuses = [status for status, _ in self.good.replies]
        assert numbers == [0, *(i for i, status in enumerate(statuses, 1) if status is ReplyStatus.OK)]
        # The values are those of the updates that were recorded, and of nothing else.
        again = handshake.make_shards(self.server.contract, self.mode, 0.25, 0, 1)
        for index, pushes, context in self.updates:
            if pushes[0].number == 0:
                again[index].initialize(pushes[0].values)
            else:
                again[index].apply(pushes, context)
        found, expected = self.server.shards[0].centre, again[0].centre
        assert found is not None and expected is not None
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        for enemy in self.met:
            enemy.vanish()
        assert self.server.links == [self.good.server_link]


class Sums(Protocol):
    spec = "ef+maxnorm:bits=3"


class Asynchronous(Protocol):
    mode = "async"


class Elastic(Protocol):
    mode, spec = "elastic", "ef+maxnorm"


SETTINGS = settings(max_examples=15, stateful_step_count=30, deadline=None)
for machine in (Protocol, Sums, Asynchronous, Elastic):
    machine.TestCase.settings = SETTINGS
TestProtocol, TestSums = Protocol.TestCase, Sums.TestCase
TestAsynchronous, TestElastic = Asynchronous.TestCase, Elastic.TestCase
