"""Strangers: bounded in time, number, memory and work, and known clients get in among them."""

from __future__ import annotations

import logging
import os
import resource
import select
import socket
import time
from collections.abc import Iterator

import pytest

from hpcsgd.server import strangers
from hpcsgd.server.listening import listen
from hpcsgd.server.proof import ServerIdentity, greet_server
from hpcsgd.server.strangers import Strangers


class Gate:
    """Strangers at a port of this host, and those of them that have proved the secret."""

    def __init__(self) -> None:
        self.proved: list[tuple[socket.socket, str]] = []
        listeners = listen(["127.0.0.1", "127.0.0.2"])
        self.port = listeners[0].getsockname()[1]
        self.strangers = Strangers(listeners, ServerIdentity("s"), lambda *found: self.proved.append(found))
        self.clients: list[socket.socket] = []

    def open(self, host: str = "127.0.0.1") -> socket.socket:
        """Open a connection, which the strangers accept."""
        source = (host, 0)
        self.clients.append(socket.create_connection(("127.0.0.1", self.port), 5, source))
        self.strangers.serve()
        return self.clients[-1]

    def admit(self, client: socket.socket) -> None:
        """Prove the secret on a connection."""
        client.setblocking(False)
        greeting, before = greet_server(client, "s", ""), len(self.proved)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            self.strangers.serve()
            try:
                next(greeting)
            except StopIteration:
                break
        assert len(self.proved) == before + 1

    def is_closed(self, client: socket.socket) -> bool:
        poll = select.poll()
        poll.register(client, select.POLLRDHUP)
        return bool(poll.poll(0))

    def close(self) -> None:
        self.strangers.close()
        for each in (*self.clients, *(connection for connection, _ in self.proved)):
            each.close()


class Clock:
    """Goes on by `step` whenever it is read."""

    def __init__(self, seconds: list[float], step: float = 0.0) -> None:
        self._seconds, self._step = seconds, step

    def monotonic(self) -> float:
        self._seconds[0] += self._step
        return self._seconds[0]

    thread_time = monotonic


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    monkeypatch.setattr(strangers, "_QUANTUM", 10.0)
    gate = Gate()
    yield gate
    gate.close()


def test_client_with_the_secret_is_handed_over_once(gate: Gate) -> None:
    gate.admit(gate.open())
    ((connection, name),) = gate.proved
    assert name == "{}:{}".format(*gate.clients[0].getsockname()) and len(gate.strangers) == 0
    connection.sendall(b"x")
    gate.strangers.serve()
    assert len(gate.proved) == 1


def test_single_bytes_do_not_extend_the_time(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    client = gate.open()
    for _ in range(19):
        now += 0.5
        client.sendall(b"x")
        gate.strangers.serve()
        gate.strangers.expire()
        assert not gate.is_closed(client)
    now += 0.6
    gate.strangers.expire()
    assert gate.is_closed(client) and len(gate.strangers) == 0


def test_oldest_of_the_host_with_most_goes_first(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate.strangers, "_most", 8)
    quiet = gate.open("127.0.0.9")
    flood = [gate.open("127.0.0.3") for _ in range(20)]
    assert len(gate.strangers) == 8 and not gate.is_closed(quiet)
    assert [gate.is_closed(each) for each in flood] == [True] * 13 + [False] * 7
    gate.admit(quiet)
    gate.admit(gate.open("127.0.0.3"))  # a known client on the host that floods


def test_host_that_opens_too_many_connections_waits_and_others_do_not(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(strangers, "_BURST", 8)
    seconds = [time.monotonic()]
    monkeypatch.setattr(strangers, "time", Clock(seconds))
    with caplog.at_level(logging.WARNING, "hpcsgd.server"):
        flood = [gate.open("127.0.0.3") for _ in range(20)]
    assert [gate.is_closed(each) for each in flood] == [False] * 8 + [True] * 12
    assert "127.0.0.3:" in caplog.text and "more than 50 connections a second" in caplog.text
    gate.admit(gate.open("127.0.0.9"))
    seconds[0] += 2 / strangers._RATE
    again = [gate.open("127.0.0.3") for _ in range(4)]
    assert [gate.is_closed(each) for each in again] == [False] * 2 + [True] * 2
    gate.admit(again[0])
    seconds[0] += 1.0
    gate.strangers.expire()
    assert not gate.strangers._rates._tokens  # nothing is kept of hosts that open few


def test_excess_is_neither_read_nor_stored(gate: Gate) -> None:
    client = gate.open()
    client.settimeout(0.2)
    sent = 0
    try:
        while sent < 2**26:
            sent += client.send(b"x" * 65536)
            gate.strangers.serve()
    except OSError:
        pass
    assert len(gate.strangers) == 0 and gate.is_closed(client)


def test_no_descriptor_and_no_memory_are_left_behind(gate: Gate) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(200):
        client = gate.open()
        client.sendall(bytes(number % 150))
        gate.strangers.serve()
        client.close()
        gate.strangers.serve()
    gate.clients.clear()
    gate.strangers.serve()
    assert len(gate.strangers) == 0 and len(os.listdir("/proc/self/fd")) == before


def test_without_descriptors_the_known_are_served(gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = gate.open()
    others = [socket.create_connection(("127.0.0.1", gate.port), 5) for _ in range(2)]
    os.close(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))  # that of the next connection
    try:
        with caplog.at_level(logging.WARNING, "hpcsgd.server"):
            gate.strangers.serve()
        assert "a connection was not admitted: " in caplog.text
        started = time.monotonic()
        for _ in range(100):
            gate.strangers.serve()
        assert time.monotonic() - started < 0.5 and caplog.text.count("not admitted") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for other in others:
            other.close()
    gate.strangers.due_at = 0.0
    gate.admit(client)


def test_strangers_have_a_twentieth_of_the_time_while_clients_send(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by a tenth of a millisecond whenever it is read."""
    monkeypatch.setattr(strangers, "_QUANTUM", 0.001)
    clock = [time.monotonic()]
    monkeypatch.setattr(strangers, "time", Clock(clock, 1e-4))
    gate.strangers.serve(busy=True)
    start = clock[0]
    spent = 0.0
    for number in range(3000):
        if number % 3 == 0:
            gate.clients.append(socket.create_connection(("127.0.0.1", gate.port), 5))
            gate.clients.pop(0).close()
        before = clock[0]
        gate.strangers.serve(busy=True)
        spent += clock[0] - before
        clock[0] += 1e-3  # for clients
    assert 0.02 < (spent - 3000 * 1e-4) / (clock[0] - start) < 0.06  # less the looks at the clock
    gate.strangers.due_at = 0.0
    gate.admit(gate.open("127.0.0.9"))


def test_what_an_admitted_client_costs_is_no_stranger_s(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(strangers, "time", Clock(seconds))

    def welcome(connection: socket.socket, name: str) -> None:
        gate.proved.append((connection, name))
        seconds[0] += 5.0

    monkeypatch.setattr(gate.strangers, "_on_proof", welcome)
    client = gate.open()
    client.setblocking(False)
    greeting = greet_server(client, "s", "")
    while not gate.proved:
        gate.strangers.serve(busy=True)
        next(greeting, None)
    assert seconds[0] == 5.0 and gate.strangers.due_at == 0.0


def test_refusals_are_logged_at_a_limited_rate(
    gate: Gate, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "hpcsgd.server"):
        for _ in range(105):
            gate.open().sendall(bytes(97))
            gate.strangers.serve()
        assert caplog.text.count("was not admitted") == 5
        now = time.monotonic() + 61
        monkeypatch.setattr(time, "monotonic", lambda: now)
        gate.strangers.expire()
    assert "100 more connections were not admitted; the last: 127.0.0.1:" in caplog.text
    assert "does not have the secret" in caplog.records[-1].getMessage()


def test_limit_of_descriptors_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    try:
        assert strangers.raise_descriptor_limit() >= 256
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
