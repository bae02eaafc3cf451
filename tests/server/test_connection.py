"""A client's connection, over links that break at any byte: every request is answered once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcsgd.errors import HpcsgdError
from hpcsgd.server import Policy, Server, connection, tcp_link
from hpcsgd.server.connection import Request
from hpcsgd.server.protocol import HEAD_BYTES, Head, Kind, Link, Party, State
from tests.support.flaky_links import SIZE, Plugs, ask, connect, run, values
from tests.support.protocol_clients import contract_of


@pytest.fixture(autouse=True, scope="module")
def at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_AGAIN", 0.0)
        yield


@given(
    st.lists(st.integers(1, 2000), max_size=25),
    st.integers(1, 700),
    st.sampled_from(["elastic", "async"]),
    st.integers(1, 6),
)
@settings(max_examples=25, deadline=None)
def test_every_request_is_answered_once(lengths: list[int], chunk: int, mode: str, pushes: int) -> None:
    server = Server(Policy(mode, 0.5))
    dials = [Plugs(server, lengths[i::2], chunk) for i in range(2)]
    both = [connect(dial, f"g{i}") for i, dial in enumerate(dials)]
    models = [np.arange(SIZE, dtype=np.float32) * 4096 * (i + 1) for i in range(2)]
    first = ask(server, both[0], Kind.PULL)
    assert first.answer is not None and first.answer.state is State.EMPTY
    ask(server, both[0], Kind.FILL, np.zeros(SIZE, np.float32))
    versions = []
    for number in range(1, pushes + 1):
        for each, model in zip(both, models, strict=True):
            request = ask(server, each, Kind.PUSHPULL, model, round=number, weight=1.0)
            assert request.answer is not None and request.answer.state is State.DONE
            assert request.answer.round == number
            versions.append(request.answer.version)
            if mode == "elastic":
                model -= values(request)
    shard = server.shards[0]
    assert versions == list(range(1, 2 * pushes + 1)) and shard.version == 2 * pushes
    assert shard.centre is not None
    total = np.arange(SIZE, dtype=np.float32) * 4096 * 3
    found = shard.centre.numpy()
    if mode == "elastic":
        np.testing.assert_array_equal(found + models[0] + models[1], total)
    else:
        np.testing.assert_array_equal(found, -pushes * total)
    for dial, each in zip(dials, both, strict=True):
        if dial.lengths:  # until it breaks at last
            each.say_goodbye()
            run(server, each, until=lambda each=each: each.closed)


def test_requests_of_many_shards_are_under_way_at_once() -> None:
    server = Server(Policy("async"))
    dial = Plugs(server, [900], 64)
    own = connect(dial)
    bodies = [np.ones(SIZE, np.float32), np.ones(3, np.float32)]
    for kind, more in ((Kind.FILL, {}), (Kind.PUSHPULL, {"round": 1, "weight": 1.0})):
        requests = []
        for shard, body in enumerate(bodies):
            head = Head(kind, shard, nbytes=body.nbytes, **more)  # type: ignore[arg-type]
            requests.append(Request(head, body.view(np.uint8), np.empty(body.nbytes, np.uint8)))
            own.ask(requests[-1])
        claim = Request(Head(Kind.CLAIM, steps=2))
        own.ask(claim)
        run(server, own, until=lambda r=requests, c=claim: all(x.done for x in (*r, c)))
    assert dial.opened == 2
    assert [values(request).tolist() for request in requests] == [[0.0] * SIZE, [0.0] * 3]


def test_what_was_told_holds_over_the_next_link_too() -> None:
    server = Server(Policy("sync"))
    dial = Plugs(server, [])
    own = connect(dial)
    ask(server, own, Kind.FILL, np.zeros(SIZE, np.float32))
    server.begin(None)
    client = server.clients["g"]
    assert client.counts
    server.lose(dial.far, "test")
    own.tell(Head(Kind.REST))
    own.tell_note(Kind.OPTIONS, {"options": [{"lr": 7.0}]})
    run(server, own, until=lambda: client.resting)
    assert client.options == [{"lr": 7.0}] and client.waited_for
    # Which is over once it pushes again.
    ask(server, own, Kind.PUSHPULL, np.ones(SIZE, np.float32), round=1, weight=1.0)
    assert not client.resting
    server.lose(dial.far, "test")
    request = ask(server, own, Kind.PULL)
    assert values(request).tolist() == [-7.0] * SIZE
    assert not client.resting


def test_the_last_answer_is_the_one_to_a_push_that_a_new_server_has_counted() -> None:
    """A server that was started again from its state knows what it has counted."""
    server = Server(Policy("async"))
    dial = Plugs(server, [])
    own = connect(dial)
    ask(server, own, Kind.FILL, np.zeros(SIZE, np.float32))
    ask(server, own, Kind.PUSHPULL, np.ones(SIZE, np.float32), round=1, weight=1.0)
    again = Server(Policy("async"))
    again.agree_on(server.contract)
    for index, shard in server.shards.items():
        again.shards[index].load_state_dict(shard.state_dict())
    again.clients["g"] = server.clients["g"]
    server.lose(dial.far, "killed")
    dial.served = again
    for number, version in ((1, 1), (2, 2)):
        body = np.ones(SIZE, np.float32)
        request = ask(again, own, Kind.PUSHPULL, body, round=number, version=1, weight=1.0)
        assert request.answer is not None and request.answer.version == version
        assert values(request).tolist() == [-version] * SIZE


def test_it_says_that_it_is_there() -> None:
    server = Server(Policy("async", lease=0.08))
    own = connect(Plugs(server, []))
    run(server, own, until=lambda: server.clients)
    far = server.links[0]
    pauses, received, deadline = [], far.received, time.monotonic() + 0.3
    while time.monotonic() < deadline:
        pauses.append(own.pump())
        server.pump(server.links)
        time.sleep(0.002)
    assert far.received >= received + 3 * HEAD_BYTES
    assert all(0 <= pause <= 0.08 / 4 for pause in pauses)
    assert server.heard == 0  # of what it has to say


# Where it comes to nothing.


def test_who_is_refused_is_told_why() -> None:
    server = Server(Policy("async", secret="right"))
    own = connect(Plugs(server, [], secret="wrong"))
    with pytest.raises(HpcsgdError, match=r"does not let this group in\n.*does not know the secret"):
        run(server, own, until=lambda: False)
    good = connect(Plugs(server, [], secret="right"), "a")
    run(server, good, until=lambda: server.clients)
    other = connect(Plugs(server, [], secret="right"), "b", contract=contract_of([4]))
    with pytest.raises(HpcsgdError, match="shards differs"):
        run(server, other, until=lambda: False)
    ask(server, good, Kind.FILL, np.zeros(SIZE, np.float32))


def test_who_errs_is_told_why_and_does_not_try_for_ever() -> None:
    """As where a server was started again without what it had."""
    server = Server(Policy("async"))
    own = connect(Plugs(server, []))
    with pytest.raises(HpcsgdError, match="pushed shard 0 before it had its values"):
        ask(server, own, Kind.PUSHPULL, np.zeros(SIZE, np.float32), round=3, weight=1.0)


class Impostor:
    """Takes the place of a server, and says what it is told to say."""

    def __init__(self, *words: tuple[Kind, dict[str, Any]]) -> None:
        self.words, self.links = words, []
        self.policy = Policy("async")

    def add(self, link: Link) -> None:
        self.links.append(link)
        for kind, note in self.words:
            link.send_note(kind, note)

    def pump(self, links: list[Link]) -> None:
        for link in list(links):
            try:
                link.pump()
            except Exception:
                self.links.remove(link)
                link.close()

    def landing(self, link: Link, head: Head) -> np.ndarray:
        return np.empty(head.nbytes, np.uint8)

    def take(self, link: Link, head: Head, body: np.ndarray) -> None: ...


def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    for nonce in ("x", "\ud800"):
        fake = Impostor((Kind.CHALLENGE, {"nonce": nonce}), (Kind.WELCOME, {"proof": "x", "lease": 1.0}))
        own = connect(Plugs(fake, [], secret="s"))  # type: ignore[arg-type]
        with pytest.raises(HpcsgdError, match="the server does not know the secret"):
            run(fake, own, until=lambda: False)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words",
    [
        [(Kind.REPLY, {})],
        [(Kind.GRANT, {})],
        [(Kind.BYE, {})],
        [(Kind.BEAT, {})],
        [(Kind.WELCOME, {"proof": tcp_link.proof("", ""), "lease": None})],
        [(Kind.WELCOME, {"proof": tcp_link.proof("", ""), "lease": float("nan")})],
        [(Kind.CHALLENGE, {"nonce": "x" * 5_000_000})],
        [],
    ],
    ids=lambda words: words[0][0].name if words else "nothing",
)
def test_a_server_that_talks_nonsense_is_tried_again_until_patience_ends(words: list[Any]) -> None:
    fake = Impostor(*words)
    own = connect(Plugs(fake, []), patience=0.05)  # type: ignore[arg-type]
    with pytest.raises(HpcsgdError, match=r"the server cannot be reached for 0\.05 s"):
        run(fake, own, until=lambda: time.sleep(0.001))  # type: ignore[arg-type]


def test_a_server_that_is_away_is_waited_for_with_patience() -> None:
    server = Server(Policy("async"))

    class Away(Plugs):
        tries = 0

        def open(self, party: Party) -> tuple[Link, str]:
            self.tries += 1
            if self.tries <= 5:
                raise OSError("nobody at home")
            return super().open(party)

    own = connect(Away(server, []))
    ask(server, own, Kind.FILL, np.zeros(SIZE, np.float32))

    class Gone(Plugs):
        def open(self, party: Party) -> tuple[Link, str]:
            raise OSError("nobody at home")

    own = connect(Gone(server, []), patience=0.05)
    with pytest.raises(HpcsgdError, match=r"cannot be reached for 0\.05 s\n.*nobody at home"):
        run(server, own, until=lambda: time.sleep(0.001))


def test_patience_begins_anew_with_every_loss() -> None:
    server = Server(Policy("async"))
    dial = Plugs(server, [])
    own = connect(dial, patience=0.4)
    ask(server, own, Kind.FILL, np.zeros(SIZE, np.float32))
    time.sleep(0.45)
    server.lose(dial.far, "test")
    ask(server, own, Kind.PULL)
    assert dial.opened == 2


def test_goodbye() -> None:
    server = Server(Policy("async"))
    own = connect(Plugs(server, []))
    assert not own.closed
    ask(server, own, Kind.FILL, np.zeros(SIZE, np.float32))
    own.say_goodbye()
    assert not own.closed
    run(server, own, until=lambda: own.closed)
    assert server.clients["g"].done and not server.links
    assert own.pump() > 1


@pytest.mark.parametrize("broken", [True, False])
def test_goodbye_to_who_does_not_hear_it(broken: bool) -> None:
    server = Server(Policy("async"))
    dial = Plugs(server, [])
    own = connect(dial)
    if broken:
        ask(server, own, Kind.FILL, np.zeros(SIZE, np.float32))
        own.say_goodbye()
        server.lose(dial.far, "test")
        own.pump()
    else:
        own.pump()  # a link, and no welcome
        own.say_goodbye()
        server.pump(server.links)
        assert not server.links
    assert own.closed
