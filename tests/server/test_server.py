"""Sessions and leases; no message of one client affects the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import HEADER_BYTES, MAX_JSON_BYTES, Header, MessageType, ReplyStatus
from tests.support.protocol_clients import (
    ONES,
    QueueLink,
    ScriptedClient,
    assert_still_serves,
    json_body,
    make_client,
    make_contract,
    pair,
)


def raw(header: Header, body: np.ndarray | None = None) -> Callable[[ScriptedClient], None]:
    """Sends a header without regard to the length of the body."""

    def act(client: ScriptedClient) -> None:
        client.link.outgoing.append((header.pack(), body))
        client.deliver()

    return act


def junk(client: ScriptedClient) -> None:
    client.link.outgoing.append((bytes(range(HEADER_BYTES)), None))
    client.deliver()


def twice(client: ScriptedClient) -> None:
    for number in (1, 2):  # the first waits for the other client
        raw(Header(MessageType.PUSHPULL, push_number=number, weight=1.0, nbytes=16), ONES)(client)


def pull_between(client: ScriptedClient) -> None:
    raw(Header(MessageType.PUSHPULL, push_number=1, weight=1.0, nbytes=16), ONES)(client)
    raw(Header(MessageType.PULL))(client)


FAULTS: dict[str, tuple[Callable[[ScriptedClient], None], str]] = {
    "junk": (junk, "no message"),
    "a second hello": (raw(Header(MessageType.HELLO, nbytes=2), json_body({})), "a second HELLO"),
    "hello without JSON": (raw(Header(MessageType.HELLO)), "cannot be read"),
    "invalid JSON": (
        raw(Header(MessageType.OPTIONS, nbytes=3), np.full(3, 255, np.uint8)),
        "cannot be read",
    ),
    "a JSON list": (raw(Header(MessageType.OPTIONS, nbytes=2), json_body([])), "cannot be read"),
    "options without options": (raw(Header(MessageType.OPTIONS, nbytes=2), json_body({})), "options"),
    "large JSON": (raw(Header(MessageType.OPTIONS, nbytes=MAX_JSON_BYTES + 1)), "at most"),
    "a body with a heartbeat": (
        raw(Header(MessageType.HEARTBEAT, nbytes=4), ONES[:1]),
        "4 bytes with a HEARTBEAT",
    ),
    "a body with a claim": (
        raw(Header(MessageType.CLAIM, steps=3, nbytes=4), ONES[:1]),
        "4 bytes with a CLAIM",
    ),
    "a body with a pull": (raw(Header(MessageType.PULL, nbytes=16), ONES), "16 bytes with a PULL"),
    "a message of servers": (raw(Header(MessageType.WELCOME)), "only servers send"),
    "a grant": (raw(Header(MessageType.GRANT, steps=3)), "only servers send"),
    "a body with a reply": (raw(Header(MessageType.REPLY, nbytes=16), ONES), "16 bytes with a REPLY"),
    "no such shard": (raw(Header(MessageType.PULL, 2)), "not its own"),
    "a push of no such shard": (
        raw(Header(MessageType.PUSH, 9, push_number=1, nbytes=16), ONES),
        "not its own",
    ),
    "a short push": (
        raw(Header(MessageType.PUSH, push_number=1, weight=1.0, nbytes=12), ONES[:3]),
        "12 bytes for shard 0",
    ),
    "a huge push": (
        raw(Header(MessageType.PUSH, push_number=1, weight=1.0, nbytes=2**40)),
        "bytes for shard 0",
    ),
    "a push without a body": (
        raw(Header(MessageType.PUSHPULL, push_number=1, weight=1.0)),
        "0 bytes for shard 0",
    ),
    "a push without a number": (
        raw(Header(MessageType.PUSHPULL, weight=1.0, nbytes=16), ONES),
        "pushed shard 0",
    ),
    "a weight of nan": (
        raw(Header(MessageType.PUSH, push_number=1, weight=math.nan, nbytes=16), ONES),
        "no message",
    ),
    "a push before the answer": (twice, "before the last reply"),
    "a pull before the answer": (pull_between, "before the last reply"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_client_with_a_protocol_error_is_disconnected_and_the_others_continue(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    act, reason = FAULTS[fault]
    server, one, two = pair(Policy("sync"))
    server.start_steps(None)
    with caplog.at_level(logging.WARNING, "hpcsgd.server"):
        act(two)
        two.receive()
    assert not two.admitted and two.lost and reason in two.refusal
    assert any(
        "g1 is disconnected" in record.getMessage() and reason in record.getMessage()
        for record in caplog.records
    )
    assert_still_serves(server, one)
    two.connect()
    assert two.admitted
    assert two.pull().tolist() == [-1] * 4


@pytest.mark.parametrize(
    "kind",
    [k for k in MessageType if k not in (MessageType.HELLO, MessageType.WELCOME)],
)
def test_messages_before_admission_disconnect(kind: MessageType) -> None:
    server, one, _ = pair(Policy("async"))
    near, server_link = QueueLink.pair(one, server)
    server.add_link(server_link)
    near.send(Header(kind, push_number=1, steps=1))
    server.pump([server_link])
    assert server_link not in server.links and server_link.closed
    assert server.steps_begun == 0 and server.shards[0].version == 0
    assert_still_serves(server, one)


def test_push_before_initialization_is_a_protocol_error() -> None:
    server = Server(Policy("async"))
    one, two = make_client(server), make_client(server, "g1")
    two.push(ONES)
    assert not two.admitted and "before its values were initialized" in two.refusal
    one.send(Header(MessageType.PULL))
    assert one.pop_reply()[0].status is ReplyStatus.NO_VALUES
    one.initialize(ONES)
    two.connect()
    assert two.pull().tolist() == ONES.tolist()


def test_shard_without_memory_disconnects_its_client() -> None:
    server = Server(Policy("elastic"))
    huge = 2**37
    contract = make_contract([huge], "elastic", "float64")
    one = ScriptedClient(server, "a", contract)
    assert one.admitted
    numpy_empty = np.empty

    def empty(size: Any, *rest: Any) -> np.ndarray:
        if size == 8 * huge:
            raise MemoryError
        return numpy_empty(size, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", empty)
        raw(Header(MessageType.INIT, nbytes=8 * huge))(one)
    one.receive()
    assert not one.admitted and "no memory" in one.refusal


def test_push_numbers_may_skip_but_not_decrease() -> None:
    """A restored server may lack the last pushes; it never applies a push twice."""
    _server, one, _ = pair(Policy("async"))
    for number, version in ((1, 1), (5, 2), (2**40, 3), (2**40, 3), (4, 3), (1, 3)):
        one.send(Header(MessageType.PUSHPULL, push_number=number, weight=1.0), ONES.view(np.uint8))
        assert one.pop_reply()[0].version == version


def test_second_initialization_gets_the_values_of_the_first() -> None:
    server = Server(Policy("async"))
    one, two = make_client(server), make_client(server, "g1")
    one.initialize(ONES)
    two.send(Header(MessageType.INIT), (2 * ONES).view(np.uint8))
    assert two.pop_reply()[1].tolist() == ONES.tolist()


def test_error_of_the_log_is_not_a_client_error() -> None:
    def full(shard: object, pushes: object, terms: object) -> None:
        raise OSError("no space left on device")

    server = Server(Policy("async"), record=full)
    one = make_client(server)
    with pytest.raises(OSError, match="no space"):
        one.initialize(ONES)


# Leases and pauses.


def test_client_silent_beyond_its_lease_is_not_awaited(caplog: pytest.LogCaptureFixture) -> None:
    server, one, two = pair(Policy("sync", lease=5.0))
    server.start_steps(None)
    one.push(ONES)
    two.server_link.last_received -= 4.0
    server.check_leases()
    one.receive()
    assert not one.received
    two.server_link.last_received -= 2.0
    one.send(Header(MessageType.HEARTBEAT))
    with caplog.at_level(logging.WARNING, "hpcsgd.server"):
        server.check_leases()
        server.check_leases()
    assert [r.getMessage() for r in caplog.records] == [
        "g1 has sent nothing for 5 s (lease): it is no longer awaited"
    ]
    one.receive()
    assert one.pop_reply()[0].status is ReplyStatus.OK
    assert_still_serves(server, one)
    two.send(Header(MessageType.HEARTBEAT))  # it is awaited again
    one.push(ONES)
    assert not one.received
    two.push(ONES)
    assert two.pop_reply()[0].status is ReplyStatus.LATE
    two.push(ONES)
    assert two.pop_reply()[0].status is ReplyStatus.OK


def test_stall_of_the_server_extends_all_leases() -> None:
    server, one, two = pair(Policy("sync", lease=5.0))
    server.start_steps(None)
    one.push(ONES)
    for link in (one.server_link, two.server_link):
        link.last_received -= 60.0
    server._leases_checked_at -= 60.0
    server.check_leases()
    one.receive()
    assert not one.received  # two is awaited
    assert max(client.silent_for for client in server.sessions.values()) < 5.0
    two.server_link.last_received -= 6.0
    server.check_leases()
    one.receive()
    assert one.pop_reply()[0].status is ReplyStatus.OK


def test_stall_of_the_server_extends_no_lease_into_the_future() -> None:
    """As that of its start, before which the sessions of its last state have their leases."""
    server, _, two = pair(Policy("sync", lease=5.0))
    two.link.close()
    server.pump([two.server_link])
    server._leases_checked_at -= 60.0
    server.check_leases()
    assert min(session.silent_for for session in server.sessions.values()) >= 0.0


def test_link_without_a_hello_is_closed_after_the_lease() -> None:
    server, one, _ = pair(Policy("sync", lease=5.0))
    _near, server_link = QueueLink.pair(one, server)
    server.add_link(server_link)
    server_link.last_received -= 6.0
    server.check_leases()
    assert server_link.closed and server_link not in server.links
    _, permanent = QueueLink.pair(one, server)
    permanent.permanent = True  # as between ranks, which cannot open another
    server.add_link(permanent)
    permanent.last_received -= 1000.0
    server.check_leases()
    assert permanent in server.links and not permanent.closed
    assert one.admitted


def test_paused_client_is_not_awaited_until_its_next_push() -> None:
    server, one, two = pair(Policy("sync"))
    server.start_steps(None)
    one.push(ONES)
    two.send(Header(MessageType.PAUSE))
    assert server.pauses == 1
    one.receive()
    assert one.pop_reply()[0].version == 1
    assert_still_serves(server, one)
    two.send(Header(MessageType.HEARTBEAT))
    two.pull()  # without joining
    assert_still_serves(server, one)
    two.pull(1)
    two.push(ONES)
    assert two.pop_reply()[0].status is ReplyStatus.LATE
    one.push(ONES)
    assert not one.received  # two is awaited again


def test_client_that_closes_its_session_is_not_awaited() -> None:
    server, one, two = pair(Policy("sync"))
    server.start_steps(None)
    one.push(ONES)
    two.send(Header(MessageType.GOODBYE))
    assert [header.type for header, _ in two.received] == [MessageType.GOODBYE]
    assert two.lost and server.sessions["g1"].done and two.server_link not in server.links
    one.receive()
    assert one.pop_reply()[0].status is ReplyStatus.OK


def test_many_messages_at_once_do_not_recurse() -> None:
    """Messages are handled in a loop, also those behind a final one."""
    server, one, two = pair(Policy("async"))
    for _ in range(5000):
        two.link.send(Header(MessageType.GOODBYE))
    two.deliver()
    near, server_link = QueueLink.pair(one, server)
    server.add_link(server_link)
    for _ in range(5000):
        near.send_json(MessageType.HELLO, {"proof": "wrong"})
    server.pump([server_link])
    assert server_link not in server.links
    assert_still_serves(server, one)


# Step quotas.


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_grants_add_up_to_the_step_limit(mode: str) -> None:
    server, one, two = pair(Policy(mode))
    for goal in (0, 1, 17):
        server.start_steps(goal)
        taken, asking = 0, [one, two]
        while asking:
            for each in list(asking):
                each.received.clear()
                each.send(Header(MessageType.CLAIM, steps=4))
                grant, _ = each.pop_reply()
                assert grant.type is MessageType.GRANT and 0 <= grant.steps <= 4
                taken += grant.steps
                assert grant.steps_begun == taken
                if grant.steps == 0:
                    asking.remove(each)
        assert taken == goal == server.steps_begun


def test_reply_to_a_push_grants_steps() -> None:
    server, one, _ = pair(Policy("async"))
    server.start_steps(5)
    steps = []
    for _ in range(4):
        one.push(ONES, steps=2)
        steps.append((one.received[-1][0].steps, one.received[-1][0].steps_begun))
    assert steps == [(2, 2), (2, 4), (1, 5), (0, 5)]
    one.push(ONES)
    assert one.received[-1][0].steps == 0 and server.steps_begun == 5


def test_claims_without_a_step_limit_are_always_granted() -> None:
    _server, one, _ = pair(Policy("async"))
    for _ in range(100):
        one.send(Header(MessageType.CLAIM, steps=2**40))
    assert one.admitted and {header.steps for header, _ in one.received} == {2**40}
