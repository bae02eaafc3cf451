"""Servers and groups that are killed, stopped, late, wrong or malicious: the others lose no push."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcsgd.server.protocol import Header, MessageType
from hpcsgd.server.rendezvous import RendezvousFile
from tests.support.background import Job

pytestmark = [pytest.mark.timeout(240), pytest.mark.together]
#: 13 batches an epoch.
SMALL = ("--data", "synthetic:samples=404", "--bucket-mib", 0.05, "--checkpoint-every", 0, "--timeout", 60)

REJECTED = """
import torch
from hpcsgd import HpcsgdError, ParameterServer, Run
for mode, file in (("sync", "servers"), ("async", "servers"), ("sync", "forged")):
    model = torch.nn.Linear(64, 10)
    try:
        Run(model, torch.optim.SGD(model.parameters(), 0.1), ParameterServer(mode, connect=file))
    except HpcsgdError as error:
        print(error, flush=True)
"""


def train(
    folder: Path,
    name: str,
    mode: str,
    seed: int,
    epochs: int,
    pause: float = 0.0,
    evaluate_every: int = 1,
    compress: str = "none",
) -> Job:
    delays = f"constant:seconds={pause}" if pause else "none"
    strategy = ("--strategy", f"ps:mode={mode}", "--connect", "servers", "--delays", delays)
    run = ("--epochs", epochs, "--seed", seed, "--out", folder, "--name", name)
    run += ("--evaluate-every", evaluate_every, "--compress", compress)
    return Job(folder, name, "train", *SMALL, *strategy, *run)


def serve(folder: Path, mode: str, *options: object, ranks: int = 0) -> Job:
    where = ("--listen", "servers", "--mode", mode, "--progress", "plain")
    return Job(folder, "server", "serve", *where, *options, ranks=ranks)


def metrics(folder: Path, server: int = 0) -> dict[str, Any]:
    """Return the last metrics record of a server."""
    path = folder / "servers.checkpoint" / f"server-{server}" / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])


def steps_of(folder: Path, name: str) -> int:
    """Return the number of steps of a group."""
    return int(json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def checkpoint(folder: Path, server: int = 0) -> dict[str, Any]:
    """Return the last checkpoint of a server."""
    steps = (folder / "servers.checkpoint" / f"server-{server}").glob("step-*")
    state: dict[str, Any] = torch.load(max(steps) / "rank-0000.pt", weights_only=True)
    return state


def kill(server: Job, *groups: Job) -> None:
    """Kill a server while the groups train."""
    for group in groups:
        group.wait_for("epoch 2.00/")
    server.send(signal.SIGKILL)
    assert server.end() == -signal.SIGKILL


def attack(port: int) -> list[socket.socket]:
    """Send messages that no client sends, and open a connection without any; returns the connections."""
    headers = [
        Header(MessageType.HELLO, nbytes=2**60),
        Header(MessageType.PUSH, 1, nbytes=2**40),
        Header(MessageType.GOODBYE),
    ]
    malformed = [b"GET / HTTP/1.1\r\nHost: here\r\nAccept: everything there is\r\n\r\n" * 9, b""]
    connections = []
    for message in [*(header.pack() for header in headers), *malformed]:
        connections.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        connections[-1].sendall(message)
    return connections


def test_groups_that_stall_die_join_late_or_are_rejected(tmp_path: Path) -> None:
    with ExitStack() as stack:
        start = stack.enter_context
        server = start(serve(tmp_path, "sync", "--lease", 1, "--linger", 3, "--groups", 3, ranks=2))
        # Rare evaluations: a group that is stopped during one does not delay the others.
        stalls = start(train(tmp_path, "stalls", "sync", 1, 9999, pause=0.02, evaluate_every=8))
        stalls.wait_for("epoch 8.00/")
        meeting = RendezvousFile.read(tmp_path / "servers")
        RendezvousFile("0" * 64, meeting.servers).write(tmp_path / "forged")
        connections = [connection for server in meeting.servers for connection in attack(server.port)]
        dies = start(train(tmp_path, "dies", "sync", 1, 999, pause=0.02))
        rejected = start(Job(tmp_path, "rejected", script=REJECTED))
        late = start(train(tmp_path, "late", "sync", 2, 2))

        dies.wait_for("epoch 1.00/")
        stalls.wait_for_more("test loss", 1)
        stalls.send(signal.SIGSTOP)
        server.wait_for("has sent nothing for 1 s (lease): it is no longer awaited")
        dies.wait_for_more("test loss", 2)
        stalls.send(signal.SIGCONT)
        server.wait_for("has sent a message again: it is awaited again")
        dies.send(signal.SIGKILL)
        server.wait_for("is disconnected: ")
        stalls.wait_for_more("test loss", 1)
        assert (late.end(), rejected.end()) == (0, 0), (late.text, rejected.text)
        server.wait_for("the client has not proved the secret for 10 s")
        stalls.send(signal.SIGUSR1)
        assert (stalls.end(), server.end()) == (0, 0), (stalls.text, server.text)
        for connection in connections:
            connection.close()
    assert not (tmp_path / "servers").exists()
    for reason in (
        "list of parameters differs",
        "mode differs: expected sync, got async",
        "not have the secret",
    ):
        assert reason in server.text and reason in rejected.text, (server.text, rejected.text)
    # Each of the servers prints it.
    assert server.text.count("have the same seed, 1, and use the same batches") == 2, server.text
    assert "no group is connected: the servers wait up to 3 s (--linger) for" in server.text
    for number in range(2):
        clients = metrics(tmp_path, number)["clients"]
        assert sorted(client["state"] for client in clients) == ["done", "done", "gone"], clients
        assert sum(client["left_out"] for client in clients) > 0, clients


@pytest.mark.parametrize("compress", ["none", "ef+maxnorm:bits=4"])
def test_a_killed_server_resumes_bit_for_bit(tmp_path: Path, compress: str) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    with ExitStack() as stack:
        start = stack.enter_context
        for folder in (undisturbed, killed):
            folder.mkdir()
        servers = [start(serve(folder, "sync")) for folder in (undisturbed, killed)]
        groups = [
            start(train(undisturbed, "one", "sync", 3, 10, compress=compress)),
            start(train(killed, "one", "sync", 3, 10, 0.02, compress=compress)),
        ]
        kill(servers[1], groups[1])
        servers[1] = start(serve(killed, "sync"))
        assert [job.end() for job in (*groups, *servers)] == [0] * 4, [
            job.text for job in (*groups, *servers)
        ]
    assert "resumed after" in servers[1].text
    assert [set(metrics(folder)["versions"].values()) for folder in (undisturbed, killed)] == [{130}] * 2
    a, b = checkpoint(undisturbed)["shards"], checkpoint(killed)["shards"]
    assert len(a) == len(b) > 1
    for index, shard in a.items():
        assert torch.equal(shard["centre"], b[index]["centre"])
        momenta = [
            [state["momentum_buffer"] for state in s["rule"]["state"].values()] for s in (shard, b[index])
        ]
        assert all(torch.equal(one, other) for one, other in zip(*momenta, strict=True)) and momenta[0]


def test_no_push_is_lost_or_counted_twice_when_the_server_is_killed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        start = stack.enter_context
        server = start(serve(tmp_path, "async", "--checkpoint-every", 0.5))
        groups = [start(train(tmp_path, f"group{seed}", "async", seed, 999, pause=0.01)) for seed in (4, 5)]
        kill(server, *groups)
        server = start(serve(tmp_path, "async", "--linger", 0))
        for group in groups:
            group.wait_for_more("test loss", 2)
        for group in groups:
            group.send(signal.SIGUSR1)
        assert [job.end() for job in (*groups, server)] == [0] * 3, [job.text for job in (*groups, server)]
    steps = [steps_of(tmp_path, f"group{seed}") for seed in (4, 5)]
    assert min(steps) >= 4 * 13 and set(metrics(tmp_path)["versions"].values()) == {sum(steps)}
