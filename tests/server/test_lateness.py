"""Late pushes: when they are dropped, and how a client rejoins the updates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Header, MessageType, ReplyStatus
from tests.support.protocol_clients import centre, make_clients


def test_client_lost_during_an_update_is_not_awaited() -> None:
    server = Server(Policy("sync"))
    one, two, three = make_clients(server, 3)
    server.start_steps(None)
    one.push(np.full(5, 1, np.float32))
    two.push(np.full(5, 5, np.float32))
    assert not one.received
    server.disconnect(two.server_link, "test")
    assert not one.received  # the third is awaited
    server.disconnect(three.server_link, "test")
    one.receive()
    assert one.pop_reply()[0].status is ReplyStatus.OK
    np.testing.assert_array_equal(centre(server), -1)
    # The push of the second had no reply: it is repeated, and reported late.
    two.connect()
    two.push_numbers = {}
    two.push(np.full(5, 5, np.float32))
    header, values = two.pop_reply()
    assert header.status is ReplyStatus.LATE and header.version == 1
    np.testing.assert_array_equal(values, -1)
    assert server.aggregator.dropped == 1
    # From then on it is awaited again.
    one.push(np.full(5, 1, np.float32))
    assert not one.received
    two.push(np.full(5, 3, np.float32))
    np.testing.assert_array_equal(centre(server), -3)


def test_dropped_push_is_dropped_when_repeated() -> None:
    server = Server(Policy("sync"))
    one, two = make_clients(server, 2)
    server.start_steps(None)
    server.disconnect(two.server_link, "test")
    one.push(np.ones(5, np.float32))
    for _ in range(3):
        two.connect()
        two.push_numbers = {}
        two.push(np.ones(5, np.float32))
        assert two.pop_reply()[0].status is ReplyStatus.LATE
        two.versions = {}
    assert server.aggregator.dropped == 1 and server.shards[0].version == 1


def test_repeated_push_gets_the_same_reply() -> None:
    server = Server(Policy("elastic", alpha=0.5))
    (client,) = make_clients(server, 1)
    client.push(np.full(5, 8, np.float32))
    first = client.pop_reply()[1]
    for _ in range(2):
        client.connect()
        client.push_numbers = {}
        client.push(np.full(5, 8, np.float32))
        np.testing.assert_array_equal(client.pop_reply()[1], first)
    np.testing.assert_array_equal(centre(server), 4)
    assert server.shards[0].version == 1


def test_reply_in_flight_is_not_overwritten_by_the_repeated_push() -> None:
    server = Server(Policy("elastic", alpha=0.5))
    (client,) = make_clients(server, 1)
    header = Header(MessageType.PUSHPULL, push_number=1, weight=1.0, nbytes=20)
    client.link.send(header, np.full(5, 8, np.float32))
    client.deliver()
    server.disconnect(client.server_link, "test")
    client.connect()
    client.link.send(header, np.full(5, 8, np.float32))
    client.deliver()  # its reply has not been sent
    server.disconnect(client.server_link, "test")
    client.connect()
    client.send(header, np.full(5, 8, np.float32))
    np.testing.assert_array_equal(client.pop_reply()[1], 4)


def test_repeated_push_does_not_bypass_the_staleness_bound() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = make_clients(server, 2)
    server.start_steps(None)
    one.push(np.ones(5, np.float32))
    assert one.pop_reply()[0].push_number == 1
    one.push(np.ones(5, np.float32))
    assert not one.received
    server.disconnect(one.server_link, "test")
    one.connect()
    one.push_numbers[0] = 1
    one.push(np.ones(5, np.float32))
    assert not one.received and server.shards[0].version == 2
    two.push(np.ones(5, np.float32))
    one.receive()
    assert one.pop_reply()[0].version == 3


def test_reply_is_sent_when_the_last_awaited_client_pauses() -> None:
    """Even if the client itself has been silent meanwhile."""
    server = Server(Policy("async", max_staleness=1))
    one, two = make_clients(server, 2)
    server.start_steps(None)
    one.push(np.ones(5, np.float32))
    one.push(np.ones(5, np.float32))
    assert one.pop_reply()[0].push_number == 1
    one.server_link.last_received = -math.inf
    server.check_leases()
    two.send(Header(MessageType.PAUSE))
    one.receive()
    assert one.pop_reply()[0].push_number == 2


def test_client_far_behind_continues_with_the_clock_of_the_others() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = make_clients(server, 2)
    server.start_steps(None)
    two.server_link.last_received = -math.inf
    server.check_leases()
    for _ in range(10):
        one.push(np.ones(5, np.float32))
        assert one.pop_reply()[0].status is ReplyStatus.OK
    two.push(np.ones(5, np.float32))
    assert two.pop_reply()[0].status is ReplyStatus.LATE
    for _ in range(5):
        for client in (one, two):
            client.push(np.ones(5, np.float32))
            assert client.pop_reply()[0].status is ReplyStatus.OK
    assert max(server.aggregator.staleness) <= 3


@pytest.mark.parametrize("s", [1, 2, 3])
def test_push_is_late_beyond_the_staleness_bound(s: int) -> None:
    for pushes in range(1, s + 4):
        server = Server(Policy("async", max_staleness=s))
        one, two = make_clients(server, 2)
        server.start_steps(None)
        two.server_link.last_received = -math.inf
        server.check_leases()
        for _ in range(pushes):
            one.push(np.ones(5, np.float32))
            one.pop_reply()
        two.push(np.ones(5, np.float32))
        assert (two.pop_reply()[0].status is ReplyStatus.LATE) == (pushes > s + 1)


def test_pushes_of_paused_clients_make_a_push_late() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = make_clients(server, 2)
    server.start_steps(None)
    two.server_link.last_received = -math.inf
    server.check_leases()
    for _ in range(10):
        one.push(np.ones(5, np.float32))
        one.pop_reply()
    one.send(Header(MessageType.PAUSE))
    two.push(np.ones(5, np.float32))
    assert two.pop_reply()[0].status is ReplyStatus.LATE
    assert set(server.aggregator.staleness) == {0}


def test_pull_without_joining_is_not_awaited() -> None:
    server = Server(Policy("sync"))
    one, two = make_clients(server, 2)
    server.start_steps(None)
    two.send(Header(MessageType.PAUSE))
    two.pull()
    one.push(np.ones(5, np.float32))
    assert one.pop_reply()[0].status is ReplyStatus.OK


def test_client_missing_in_the_state_has_the_newest_clock() -> None:
    server = Server(Policy("async", max_staleness=1))
    (one,) = make_clients(server, 1)
    for _ in range(4):
        one.push(np.ones(5, np.float32))
        one.pop_reply()
    state = server.shards[0].state_dict()
    other = Server(Policy("async", max_staleness=1))
    two = make_clients(other, 2)[1]
    other.shards[0].load_state_dict(state)
    np.testing.assert_array_equal(centre(other), -4)
    two.pull()
    two.push(np.ones(5, np.float32))
    assert two.pop_reply()[0].status is ReplyStatus.OK
