"""A server that random frames are sent to, by strangers and by clients with the secret: 10⁵ in all."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import time
from collections.abc import Generator, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcsgd.diagnostics.traffic import Traffic
from hpcsgd.server.connection import Connection, Request
from hpcsgd.server.proof import Greeting, greet_server
from hpcsgd.server.protocol import Disconnected, Header, MessageType, ReplyStatus
from hpcsgd.server.rendezvous import RendezvousFile
from hpcsgd.strategies.parameter_server.connect import TCPConnector
from tests.support.background import Job

pytestmark = [pytest.mark.long, pytest.mark.timeout(600), pytest.mark.together]

FRAMES = 50_000  # in each of two runs
RATE = 1000  # frames a second; more would take the processor from the server, by their number alone
CONNECTIONS = 40  # of the enemy at a time
WINDOW = 5.0  # seconds with the enemy, and without, in turn
COMPUTE = 0.025  # seconds between two exchanges of the good client
NUMEL = 250_000
CONTRACT = {
    "mode": "async",
    "servers": 1,
    "optimizer": "SGD",
    "compress": None,
    "keys": ["model"],
    "shards": [["float32", NUMEL, [[0, NUMEL, 0]]]],
}


class GoodClient:
    """Exchanges a model of 1 MB with the server, with pauses as for the computation of a gradient."""

    def __init__(self, path: Path) -> None:
        hello = {"client": "good", "talker": 0, "talkers": 1, "contract": CONTRACT, "options": [{"lr": 1e-3}]}
        self._connection = Connection(TCPConnector(path, 0, Traffic()), lambda: hello, 60.0)
        self._values, self._target = np.zeros(4 * NUMEL, np.uint8), np.empty(4 * NUMEL, np.uint8)
        self.pushes = 0
        self._ask(Header(MessageType.INIT, nbytes=self._values.nbytes))

    def _ask(self, header: Header) -> None:
        request = Request(header, self._values, self._target)
        self._connection.send_request(request)
        while not request.done:
            if self._connection.pump():
                time.sleep(50e-6)
        assert request.reply is not None and request.reply.status is ReplyStatus.OK

    def exchanges_per_second(self, seconds: float) -> float:
        started, before = time.monotonic(), self.pushes
        while time.monotonic() < started + seconds:
            self.pushes += 1
            number = self.pushes
            kind, nbytes = MessageType.PUSHPULL, self._values.nbytes
            self._ask(Header(kind, push_number=number, version=number, weight=1.0, nbytes=nbytes))
            time.sleep(COMPUTE)
        return (self.pushes - before) / (time.monotonic() - started)

    def close(self) -> None:
        self._connection.start_close()
        while not self._connection.closed:
            self._connection.pump()


def frames(draw: random.Random) -> Iterator[bytes]:
    """Random bytes, headers with random numbers, and parts of both."""
    numbers = (0, 1, 2, 63, 4 * NUMEL, 2**31, 2**40)
    while True:
        header = Header(
            draw.choice(list(MessageType)),
            draw.choice((0, 0, 1, 2**32 - 1)),
            draw.choice(list(ReplyStatus)),
            push_number=draw.choice(numbers),
            version=draw.choice(numbers),
            weight=draw.choice((0.0, 1.0, 1e300)),
            steps=draw.choice(numbers),
            nbytes=draw.choice((0, 0, 0, 5, 100, 4 * NUMEL, 2**22, 2**40)),
            part=draw.choice((0, 1, 9)),
            terms=draw.choice((0, 1, 9)),
        )
        frame = header.pack() + draw.randbytes(min(header.nbytes, 100))
        yield draw.choice((frame, frame, frame[: draw.randrange(len(frame))], draw.randbytes(90)))


def enemy(path: Path, seed: int, seconds: float, attacking: Event, sent: Any) -> None:
    """Send frames at a steady rate while `attacking`, over some connections at a time.

    The enemy stands for another machine: it computes when server and client leave a core idle.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    file, draw = RendezvousFile.read(path), random.Random(seed)
    source, started, begun = frames(random.Random(seed)), 0.0, 0
    links: list[socket.socket] = []
    opening: list[Iterator[socket.socket | None]] = []
    while sent.value < FRAMES:
        if not attacking.is_set():
            attacking.wait()
            started, begun = time.monotonic(), sent.value
        if len(links) + len(opening) < CONNECTIONS:
            opening.append(_connect(file, draw.random() < 0.5, draw))
        for connection in list(opening):
            link = next(connection, None)
            if link is not None:
                opening.remove(connection)
                links.append(link)
        if links:
            _send(links, next(source), draw)
            sent.value += 1
        time.sleep(max(1 / RATE / 4, started + (sent.value - begun) / RATE - time.monotonic()))


def _send(links: list[socket.socket], frame: bytes, draw: random.Random) -> None:
    """Send a frame over one of the links, some of which vanish then."""
    link = links[draw.randrange(len(links))]
    vanishes = draw.random() < 0.02
    try:
        link.send(frame)
    except OSError:
        vanishes = True
    if vanishes:
        links.remove(link)
        link.close()


def _connect(file: RendezvousFile, admitted: bool, draw: random.Random) -> Iterator[socket.socket | None]:
    """A new connection, as soon as it is one: greeted and admitted, or a stranger's.

    It comes from one of many addresses: of a single one the server takes no more than 50 a second.
    """
    (server,) = file.servers
    while True:
        link = socket.create_connection(
            ("127.0.0.1", server.port), 10, (f"127.0.0.{draw.randrange(2, 250)}", 0)
        )
        link.setblocking(False)
        if not admitted:
            break
        try:
            link = yield from _without_events(greet_server(link, file.secret, server.fingerprint))
        except Disconnected:
            continue
        hello = {"client": f"enemy {draw.randrange(8)}", "talker": 0, "talkers": 1, "contract": CONTRACT}
        body = json.dumps({**hello, "options": [{"lr": 1e-3}]}).encode()
        link.send(Header(MessageType.HELLO, nbytes=len(body)).pack() + body)
        break
    yield link


def _without_events(greeting: Greeting) -> Generator[None, None, socket.socket]:
    while True:
        try:
            next(greeting)
        except StopIteration as done:
            link: socket.socket = done.value
            return link
        yield None


@pytest.mark.parametrize("tls", ["--no-tls", "--tls"])
def test_server_stands_in_memory_descriptors_and_speed(tmp_path: Path, tls: str) -> None:
    options = ("--listen", "servers", "--mode", "async", "--lease", 2, "--progress", "plain", tls)
    with Job(tmp_path, "server", "serve", *options) as server:
        server.wait_for("hpcsgd train --connect")
        good, process = GoodClient(tmp_path / "servers"), Path(f"/proc/{server.pids()[0]}")
        context = multiprocessing.get_context("spawn")
        attacking, sent = context.Event(), context.Value("q", 0)
        arguments = (tmp_path / "servers", 1, WINDOW, attacking, sent)
        hand = context.Process(target=enemy, args=arguments, daemon=True)
        hand.start()
        good.exchanges_per_second(WINDOW)
        descriptors, memory = _descriptors(process), _memory(process)
        quiet, attacked, largest, most = [], [], 0, 0
        while sent.value < FRAMES:
            quiet.append(good.exchanges_per_second(WINDOW))
            attacking.set()
            attacked.append(good.exchanges_per_second(WINDOW))
            largest, most = max(largest, _memory(process)), max(most, _descriptors(process))
            attacking.clear()
        hand.join()
        seconds = WINDOW * len(attacked)
        good.exchanges_per_second(15)  # the last strangers' time is over
        assert _descriptors(process) <= descriptors + 8  # those with the secret are silent at most
        good.close()
        server.send(signal.SIGTERM)
        assert server.end() == 0, server.text
    speed = statistics.median(a / q for a, q in zip(attacked, quiet, strict=True))
    print(f"\n{tls}: {sent.value:,} frames, {sent.value / seconds:.0f} a second;", end=" ")
    print(f"exchanges a second {statistics.median(quiet):.1f}, with frames {speed:.3f} of that;", end=" ")
    print(f"memory {memory / 2**20:.0f} to {largest / 2**20:.0f} MiB;", end=" ")
    print(f"descriptors {descriptors}, at most {most}")
    assert speed >= 0.95 and largest <= 1.05 * memory
    text = (tmp_path / "servers.checkpoint" / "server-0" / "metrics.jsonl").read_text()
    clients = {row["name"]: row for row in json.loads(text.splitlines()[-1])["clients"]}
    assert clients["good"]["pushes"] == good.pushes and clients["good"]["left_out"] == 0


def _memory(process: Path) -> int:
    pages = int((process / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors(process: Path) -> int:
    return len(os.listdir(process / "fd"))
