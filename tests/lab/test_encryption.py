"""Between hosts, links to servers are encrypted: what is on the wire is read on the bridge."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.lab.hosts import Hosts, obstacle

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.together,
    pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-"),
]
_ALL_PROTOCOLS = 3
MARK = b"list of parameters"  # in the contract, which the client sends as JSON


class Listener:
    """Counts the packets of an interface that hold some bytes, in a thread."""

    def __init__(self, interface: str, mark: bytes) -> None:
        self.found = self.packets = 0
        self._mark, self._ended = mark, threading.Event()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
        self._socket.bind((interface, 0))
        self._socket.settimeout(0.1)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended.is_set():
            try:
                packet = self._socket.recv(2**16)
            except TimeoutError:
                continue
            self.packets += 1
            self.found += self._mark in packet

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._socket.close()


@pytest.mark.parametrize(("option", "readable"), [((), False), (("--no-tls",), True)])
def test_what_passes_between_hosts(tmp_path: Path, option: tuple[str, ...], readable: bool) -> None:
    def start(host: int, *command: object) -> subprocess.Popen[str]:
        enter = ["ip", "netns", "exec", f"{hosts.name}-{host}"]
        return subprocess.Popen(
            [*enter, sys.executable, "-m", "hpcsgd", *map(str, command)],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    serve = ("serve", "--listen", "servers", "--bind", "eth0", "--progress", "plain", *option)
    train = ("train", "--data", "synthetic:samples=404", "--epochs", 2, "--progress", "plain", "--threads", 1)
    with Hosts(2, "1gbit") as hosts:
        listener = Listener(f"{hosts.name}p2", MARK)
        server = start(1, *serve)
        group = start(2, *train, "--strategy", "ps", "--connect", "servers", "--out", ".", "--name", "run")
        outputs = [process.communicate(timeout=120)[0] for process in (group, server)]
        listener.close()
    assert (group.returncode, server.returncode) == (0, 0), outputs
    assert listener.packets > 100 and (listener.found > 0) == readable
    assert ("links are not encrypted (--no-tls)" in outputs[1]) == readable
