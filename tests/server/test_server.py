"""Who is heard and who is waited for; whatever a client sends, the others go on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcsgd.server import Policy, Server
from hpcsgd.server.protocol import HEAD_BYTES, NOTES, Head, Kind, State
from tests.support.protocol_clients import ONES, Talker, Wire, as_bytes, contract_of, goes_on, pair, talker


def raw(head: Head, body: np.ndarray | None = None) -> Callable[[Talker], None]:
    """Says what it likes of its length."""

    def act(client: Talker) -> None:
        client.link.leaving.append((head.pack(), body))
        client.deliver()

    return act


def junk(client: Talker) -> None:
    client.link.leaving.append((bytes(range(HEAD_BYTES)), None))
    client.deliver()


def twice(client: Talker) -> None:
    for number in (1, 2):  # the other one is waited for
        raw(Head(Kind.PUSHPULL, round=number, weight=1.0, nbytes=16), ONES)(client)


def pull_between(client: Talker) -> None:
    raw(Head(Kind.PUSHPULL, round=1, weight=1.0, nbytes=16), ONES)(client)
    raw(Head(Kind.PULL))(client)


FAULTS: dict[str, tuple[Callable[[Talker], None], str]] = {
    "junk": (junk, "no message"),
    "a second hello": (raw(Head(Kind.HELLO, nbytes=2), as_bytes({})), "twice"),
    "hello without a note": (raw(Head(Kind.HELLO)), "cannot be read"),
    "an unreadable note": (raw(Head(Kind.OPTIONS, nbytes=3), np.full(3, 255, np.uint8)), "cannot be read"),
    "a list as a note": (raw(Head(Kind.OPTIONS, nbytes=2), as_bytes([])), "cannot be read"),
    "options without options": (raw(Head(Kind.OPTIONS, nbytes=2), as_bytes({})), "options"),
    "a large note": (raw(Head(Kind.OPTIONS, nbytes=NOTES + 1)), "at most"),
    "a body with a beat": (raw(Head(Kind.BEAT, nbytes=4), ONES[:1]), "4 bytes with a BEAT"),
    "a body with a claim": (raw(Head(Kind.CLAIM, steps=3, nbytes=4), ONES[:1]), "4 bytes with a CLAIM"),
    "a body with a pull": (raw(Head(Kind.PULL, nbytes=16), ONES), "16 bytes with a PULL"),
    "what servers say": (raw(Head(Kind.WELCOME)), "for servers alone"),
    "a grant": (raw(Head(Kind.GRANT, steps=3)), "for servers alone"),
    "a body with a reply": (raw(Head(Kind.REPLY, nbytes=16), ONES), "16 bytes with a REPLY"),
    "no such shard": (raw(Head(Kind.PULL, 2)), "not its own"),
    "a push of no such shard": (raw(Head(Kind.PUSH, 9, round=1, nbytes=16), ONES), "not its own"),
    "a short push": (raw(Head(Kind.PUSH, round=1, weight=1.0, nbytes=12), ONES[:3]), "12 bytes for shard 0"),
    "a huge push": (raw(Head(Kind.PUSH, round=1, weight=1.0, nbytes=2**40)), "bytes for shard 0"),
    "a push without a body": (raw(Head(Kind.PUSHPULL, round=1, weight=1.0)), "0 bytes for shard 0"),
    "a push without a number": (raw(Head(Kind.PUSHPULL, weight=1.0, nbytes=16), ONES), "pushed shard 0"),
    "a weight of nan": (raw(Head(Kind.PUSH, round=1, weight=math.nan, nbytes=16), ONES), "no message"),
    "a push before the answer": (twice, "before the last was answered"),
    "a pull before the answer": (pull_between, "before the last was answered"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_who_errs_ends_and_the_others_go_on(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    act, reason = FAULTS[fault]
    server, one, two = pair(Policy("sync"))
    server.begin(None)
    with caplog.at_level(logging.WARNING, "hpcsgd.server"):
        act(two)
        two.listen()
    assert not two.let_in and two.lost and reason in two.reason
    assert any(
        "g1 is gone" in record.getMessage() and reason in record.getMessage() for record in caplog.records
    )
    goes_on(server, one)
    two.connect()
    assert two.let_in
    assert two.fetch().tolist() == [-1] * 4


@pytest.mark.parametrize("kind", [k for k in Kind if k not in (Kind.HELLO, Kind.CHALLENGE, Kind.WELCOME)])
def test_strangers_are_not_heard(kind: Kind) -> None:
    server, one, _ = pair(Policy("async"))
    near, far = Wire.pair(one, server)
    server.add(far)
    near.send(Head(kind, round=1, steps=1))
    server.pump([far])
    assert far not in server.links and far.closed
    assert server.begun == 0 and server.shards[0].version == 0
    goes_on(server, one)


def test_a_push_before_there_are_values_ends_its_client() -> None:
    server = Server(Policy("async"))
    one, two = talker(server), talker(server, "g1")
    two.push(ONES)
    assert not two.let_in and "before it had its values" in two.reason
    one.say(Head(Kind.PULL))
    assert one.answer()[0].state is State.EMPTY
    one.fill(ONES)
    two.connect()
    assert two.fetch().tolist() == ONES.tolist()


def test_what_there_is_no_memory_for_ends_its_client() -> None:
    server = Server(Policy("elastic"))
    huge = 2**37
    contract = contract_of([huge], "elastic", "float64")
    one = Talker(server, "a", contract)
    assert one.let_in
    numpy_empty = np.empty

    def empty(size: Any, *rest: Any) -> np.ndarray:
        if size == 8 * huge:
            raise MemoryError
        return numpy_empty(size, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", empty)
        raw(Head(Kind.FILL, nbytes=8 * huge))(one)
    one.listen()
    assert not one.let_in and "no memory" in one.reason


def test_numbers_of_pushes_may_jump_ahead_but_not_back() -> None:
    """A server that comes back may know less than its clients; it never counts a push again."""
    _server, one, _ = pair(Policy("async"))
    for number, version in ((1, 1), (5, 2), (2**40, 3), (2**40, 3), (4, 3), (1, 3)):
        one.say(Head(Kind.PUSHPULL, round=number, weight=1.0), ONES.view(np.uint8))
        assert one.answer()[0].version == version


def test_the_second_fill_is_answered_with_the_first() -> None:
    server = Server(Policy("async"))
    one, two = talker(server), talker(server, "g1")
    one.fill(ONES)
    two.say(Head(Kind.FILL), (2 * ONES).view(np.uint8))
    assert two.answer()[1].tolist() == ONES.tolist()


def test_an_error_of_the_log_is_not_taken_for_one_of_a_client() -> None:
    def full(shard: object, pushes: object, terms: object) -> None:
        raise OSError("no space left on device")

    server = Server(Policy("async"), record=full)
    one = talker(server)
    with pytest.raises(OSError, match="no space"):
        one.fill(ONES)


# Who is waited for.


def test_who_is_silent_for_longer_than_its_lease_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    server, one, two = pair(Policy("sync", lease=5.0))
    server.begin(None)
    one.push(ONES)
    two.far.heard -= 4.0
    server.watch()
    one.listen()
    assert not one.heard
    two.far.heard -= 2.0
    one.say(Head(Kind.BEAT))
    with caplog.at_level(logging.WARNING, "hpcsgd.server"):
        server.watch()
        server.watch()
    assert [r.getMessage() for r in caplog.records] == [
        "g1 has been silent for 5 s: nobody waits for it any more"
    ]
    one.listen()
    assert one.answer()[0].state is State.DONE
    goes_on(server, one)
    two.say(Head(Kind.BEAT))  # it is back
    one.push(ONES)
    assert not one.heard
    two.push(ONES)
    assert two.answer()[0].state is State.LATE
    two.push(ONES)
    assert two.answer()[0].state is State.DONE


def test_a_server_that_stood_still_does_not_blame_its_clients() -> None:
    server, one, two = pair(Policy("sync", lease=5.0))
    server.begin(None)
    one.push(ONES)
    for link in (one.far, two.far):
        link.heard -= 60.0
    server._watched -= 60.0
    server.watch()
    one.listen()
    assert not one.heard  # two is waited for
    assert max(client.silent_for for client in server.clients.values()) < 5.0
    two.far.heard -= 6.0
    server.watch()
    one.listen()
    assert one.answer()[0].state is State.DONE


def test_who_says_nothing_at_all_is_not_kept() -> None:
    server, one, _ = pair(Policy("sync", lease=5.0))
    _near, far = Wire.pair(one, server)
    server.add(far)
    far.heard -= 6.0
    server.watch()
    assert far.closed and far not in server.links
    _, lasting = Wire.pair(one, server)
    lasting.lasting = True  # as between ranks: there would be no other
    server.add(lasting)
    lasting.heard -= 1000.0
    server.watch()
    assert lasting in server.links and not lasting.closed
    assert one.let_in


def test_who_rests_is_not_waited_for_until_it_pushes_again() -> None:
    server, one, two = pair(Policy("sync"))
    server.begin(None)
    one.push(ONES)
    two.say(Head(Kind.REST))
    assert server.rests == 1
    one.listen()
    assert one.answer()[0].version == 1
    goes_on(server, one)
    two.say(Head(Kind.BEAT))
    two.fetch()  # to look at them
    goes_on(server, one)
    two.fetch(1)
    two.push(ONES)
    assert two.answer()[0].state is State.LATE
    one.push(ONES)
    assert not one.heard  # for now it is


def test_who_says_goodbye_is_heard_and_not_waited_for() -> None:
    server, one, two = pair(Policy("sync"))
    server.begin(None)
    one.push(ONES)
    two.say(Head(Kind.BYE))
    assert [head.kind for head, _ in two.heard] == [Kind.BYE]
    assert two.lost and server.clients["g1"].done and two.far not in server.links
    one.listen()
    assert one.answer()[0].state is State.DONE


def test_many_words_at_once_are_no_deep_stack() -> None:
    """A client's words are taken one after the other, also behind a last one."""
    server, one, two = pair(Policy("async"))
    for _ in range(5000):
        two.link.send(Head(Kind.BYE))
    two.deliver()
    near, far = Wire.pair(one, server)
    server.add(far)
    for _ in range(5000):
        near.send_note(Kind.HELLO, {"proof": "wrong"})
    server.pump([far])
    assert far not in server.links
    goes_on(server, one)


# Who may take steps.


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_grants_are_as_many_as_the_goal(mode: str) -> None:
    server, one, two = pair(Policy(mode))
    for goal in (0, 1, 17):
        server.begin(goal)
        taken, asking = 0, [one, two]
        while asking:
            for each in list(asking):
                each.heard.clear()
                each.say(Head(Kind.CLAIM, steps=4))
                grant, _ = each.answer()
                assert grant.kind is Kind.GRANT and 0 <= grant.steps <= 4
                taken += grant.steps
                assert grant.begun == taken
                if grant.steps == 0:
                    asking.remove(each)
        assert taken == goal == server.begun


def test_an_answer_grants_steps_too() -> None:
    server, one, _ = pair(Policy("async"))
    server.begin(5)
    steps = []
    for _ in range(4):
        one.push(ONES, steps=2)
        steps.append((one.heard[-1][0].steps, one.heard[-1][0].begun))
    assert steps == [(2, 2), (2, 4), (1, 5), (0, 5)]
    one.push(ONES)
    assert one.heard[-1][0].steps == 0 and server.begun == 5


def test_claims_without_a_goal_have_no_end() -> None:
    _server, one, _ = pair(Policy("async"))
    for _ in range(100):
        one.say(Head(Kind.CLAIM, steps=2**40))
    assert one.let_in and {head.steps for head, _ in one.heard} == {2**40}
