"""Who is left out of updates, for nobody has waited for it, and how it gets in again."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import Head, Kind, State
from tests.support.protocol_clients import centre, group


def test_who_is_gone_in_the_middle_of_a_round_is_not_waited_for() -> None:
    server = Server(Policy("sync"))
    one, two, three = group(server, 3)
    server.begin(None)
    one.push(np.full(5, 1, np.float32))
    two.push(np.full(5, 5, np.float32))
    assert not one.heard
    server.lose(two.far, "test")
    assert not one.heard  # for the third
    server.lose(three.far, "test")
    one.listen()
    assert one.answer()[0].state is State.DONE
    np.testing.assert_array_equal(centre(server), -1)
    # Of the second nothing was acknowledged: it asks again, and is told that it was too late.
    two.connect()
    two.rounds = {}
    two.push(np.full(5, 5, np.float32))
    head, values = two.answer()
    assert head.state is State.LATE and head.version == 1
    np.testing.assert_array_equal(values, -1)
    assert server.counting.left_out == 1
    # From then on it counts again.
    one.push(np.full(5, 1, np.float32))
    assert not one.heard
    two.push(np.full(5, 3, np.float32))
    np.testing.assert_array_equal(centre(server), -3)


def test_a_push_that_was_left_out_is_left_out_when_it_comes_again() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2)
    server.begin(None)
    server.lose(two.far, "test")
    one.push(np.ones(5, np.float32))
    for _ in range(3):
        two.connect()
        two.rounds = {}
        two.push(np.ones(5, np.float32))
        assert two.answer()[0].state is State.LATE
        two.versions = {}
    assert server.counting.left_out == 1 and server.shards[0].version == 1


def test_a_push_that_comes_again_gets_the_same_answer() -> None:
    server = Server(Policy("elastic", alpha=0.5))
    (talker,) = group(server, 1)
    talker.push(np.full(5, 8, np.float32))
    first = talker.answer()[1]
    for _ in range(2):
        talker.connect()
        talker.rounds = {}
        talker.push(np.full(5, 8, np.float32))
        np.testing.assert_array_equal(talker.answer()[1], first)
    np.testing.assert_array_equal(centre(server), 4)
    assert server.shards[0].version == 1


def test_an_answer_on_its_way_is_not_written_over_by_the_same_push_again() -> None:
    server = Server(Policy("elastic", alpha=0.5))
    (talker,) = group(server, 1)
    head = Head(Kind.PUSHPULL, round=1, weight=1.0, nbytes=20)
    talker.link.send(head, np.full(5, 8, np.float32))
    talker.deliver()
    server.lose(talker.far, "test")
    talker.connect()
    talker.link.send(head, np.full(5, 8, np.float32))
    talker.deliver()  # its answer has not left
    server.lose(talker.far, "test")
    talker.connect()
    talker.say(head, np.full(5, 8, np.float32))
    np.testing.assert_array_equal(talker.answer()[1], 4)


def test_nobody_is_let_ahead_by_asking_again() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    one.push(np.ones(5, np.float32))
    assert one.answer()[0].round == 1
    one.push(np.ones(5, np.float32))
    assert not one.heard
    server.lose(one.far, "test")
    one.connect()
    one.rounds[0] = 1
    one.push(np.ones(5, np.float32))
    assert not one.heard and server.shards[0].version == 2
    two.push(np.ones(5, np.float32))
    one.listen()
    assert one.answer()[0].version == 3


def test_who_waits_for_the_last_that_counted_is_answered() -> None:
    """Even where it has itself been silent meanwhile."""
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    one.push(np.ones(5, np.float32))
    one.push(np.ones(5, np.float32))
    assert one.answer()[0].round == 1
    one.far.heard = -math.inf
    server.watch()
    two.say(Head(Kind.REST))
    one.listen()
    assert one.answer()[0].round == 2


def test_who_has_fallen_far_behind_goes_on_from_where_the_others_are() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    two.far.heard = -math.inf
    server.watch()
    for _ in range(10):
        one.push(np.ones(5, np.float32))
        assert one.answer()[0].state is State.DONE
    two.push(np.ones(5, np.float32))
    assert two.answer()[0].state is State.LATE
    for _ in range(5):
        for talker in (one, two):
            talker.push(np.ones(5, np.float32))
            assert talker.answer()[0].state is State.DONE
    assert max(server.counting.staleness) <= 3


@pytest.mark.parametrize("s", [1, 2, 3])
def test_so_far_behind_is_too_late_and_no_less(s: int) -> None:
    for pushes in range(1, s + 4):
        server = Server(Policy("async", max_staleness=s))
        one, two = group(server, 2)
        server.begin(None)
        two.far.heard = -math.inf
        server.watch()
        for _ in range(pushes):
            one.push(np.ones(5, np.float32))
            one.answer()
        two.push(np.ones(5, np.float32))
        assert (two.answer()[0].state is State.LATE) == (pushes > s + 1)


def test_what_those_have_pushed_who_rest_makes_a_push_late_too() -> None:
    server = Server(Policy("async", max_staleness=1))
    one, two = group(server, 2)
    server.begin(None)
    two.far.heard = -math.inf
    server.watch()
    for _ in range(10):
        one.push(np.ones(5, np.float32))
        one.answer()
    one.say(Head(Kind.REST))
    two.push(np.ones(5, np.float32))
    assert two.answer()[0].state is State.LATE
    assert set(server.counting.staleness) == {0}


def test_to_look_at_the_values_is_not_to_take_part() -> None:
    server = Server(Policy("sync"))
    one, two = group(server, 2)
    server.begin(None)
    two.say(Head(Kind.REST))
    two.fetch()
    one.push(np.ones(5, np.float32))
    assert one.answer()[0].state is State.DONE


def test_clients_that_a_state_does_not_know_count_too() -> None:
    server = Server(Policy("async", max_staleness=1))
    (one,) = group(server, 1)
    for _ in range(4):
        one.push(np.ones(5, np.float32))
        one.answer()
    state = server.shards[0].state_dict()
    other = Server(Policy("async", max_staleness=1))
    two = group(other, 2)[1]
    other.shards[0].load_state_dict(state)
    np.testing.assert_array_equal(centre(other), -4)
    two.fetch()
    two.push(np.ones(5, np.float32))
    assert two.answer()[0].state is State.DONE
