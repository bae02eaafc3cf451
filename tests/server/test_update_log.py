"""A server restored from states and logs equals the last one, bit for bit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd import HpcsgdError
from hpcsgd.server import Policy, Server, update_log
from hpcsgd.server.protocol import Header, MessageType
from tests.support.protocol_clients import ScriptedClient, make_contract

SIZES = [5, 3]
OPTIONS = {"SGD": [{"lr": 0.1, "momentum": 0.9}], "Adam": [{"lr": 0.1, "betas": [0.9, 0.99]}]}
MODES = [("sync", "SGD"), ("async", "Adam"), ("elastic", "SGD")]


class Job:
    """A server, its restored successors, and two clients."""

    def __init__(self, folder: Path, mode: str, optimizer: str = "SGD", lease: float = 10.0) -> None:
        self.folder, self.policy = folder, Policy(mode, lease=lease)
        self.contract, self.options = make_contract(SIZES, mode, optimizer=optimizer), OPTIONS[optimizer]
        self.random = np.random.default_rng(1)
        self.update_log = update_log.UpdateLog(folder)
        self.server = Server(self.policy, record=self.update_log.record_update)
        self.update_log.start(self.server, 0)
        self.clients = [self.come(name) for name in "ab"]
        for shard, size in enumerate(SIZES):
            self.clients[0].initialize(self.draw(size), shard)
            self.clients[1].pull(shard)

    def come(self, name: str) -> ScriptedClient:
        return ScriptedClient(self.server, name, self.contract, self.options)

    def draw(self, size: int) -> np.ndarray:
        return self.random.standard_normal(size).astype(np.float32)

    def work(self, rounds: int) -> None:
        for _ in range(rounds):
            for client in self.clients:
                for shard, size in enumerate(SIZES):
                    client.push(self.draw(size), shard, weight=1 + 2 * shard)
            for client in self.clients:
                client.receive()
                assert [header.shard for header, _ in client.received] == [0, 1]
                client.received.clear()
        self.update_log.record_sessions()

    def again(self, since: int = 0, saved: dict[str, Any] | None = None) -> Server:
        """Restore another server from a state and the log since."""
        server = Server(self.policy)
        if saved is not None:
            update_log.restore_server(server, saved)
        update_log.UpdateLog(self.folder).replay(server, since)
        return server


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Flatten a nested state to one dict, with tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return {key: value.numpy().tobytes()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in leaves(item, f"{key}/{name}").items()}
    return {key: value}


def known(server: Server) -> dict[str, Any]:
    """State that must survive; the number of dropped pushes is that of the last snapshot."""
    found = leaves(update_log.server_state(server))
    return {key: value for key, value in found.items() if "left_out" not in key}


@pytest.mark.parametrize(("mode", "optimizer"), MODES)
def test_server_is_restored_from_the_log_and_from_a_state_in_between(
    tmp_path: Path, mode: str, optimizer: str
) -> None:
    job = Job(tmp_path, mode, optimizer)
    job.work(3)
    assert known(job.again()) == known(job.server)
    saved = update_log.server_state(job.server)
    job.update_log.start(job.server, 1)
    assert known(job.again(1, saved)) == known(job.server)
    job.work(2)
    wanted = known(job.server)
    assert known(job.again(1, saved)) == known(job.again(0)) == wanted
    job.update_log.remove_before(1)
    assert job.update_log.numbers() == [1]
    assert known(job.again(1, saved)) == wanted and wanted != leaves(saved)


def test_state_is_not_changed_by_later_updates(tmp_path: Path) -> None:
    for mode, optimizer in MODES:
        (tmp_path / mode).mkdir()
        job = Job(tmp_path / mode, mode, optimizer)
        job.work(1)
        saved = update_log.server_state(job.server)
        before = leaves(saved)
        job.work(1)
        assert leaves(saved) == before != leaves(update_log.server_state(job.server))


@pytest.mark.parametrize("mode", ["sync", "async", "elastic"])
def test_push_whose_reply_was_lost_is_not_applied_again(tmp_path: Path, mode: str) -> None:
    job = Job(tmp_path, mode)
    values = {name: job.draw(SIZES[0]) for name in "ab"}
    for client in job.clients:
        client.push(values[client.name])
    job.clients[0].receive()
    answers = {client.name: client.pop_reply() for client in job.clients}
    versions = answers["a"][0].version, answers["b"][0].version
    job.server = job.again()
    for name, (header, values_then) in answers.items():
        client = job.come(name)
        assert client.admitted
        client.push(values[name], 0)
        again, values_now = client.pop_reply()
        if mode == "elastic" or header.version == max(versions):
            assert values_now.tobytes() == values_then.tobytes()
        assert again.version == max(versions) == job.server.shards[0].version


@pytest.mark.parametrize("rounds", [0, 2])
def test_restored_client_is_awaited_until_its_lease_expires(tmp_path: Path, rounds: int) -> None:
    lease = 1.0  # the calls before the first check take less, also on a machine with other work
    job = Job(tmp_path, "sync", lease=lease)
    job.work(rounds)
    for client in job.clients:
        client.send(Header(MessageType.PULL, 0, steps=1))  # and joins
    job.update_log.record_sessions()
    job.server = job.again()
    first = job.come("a")
    first.pull()
    first.push_numbers = {0: rounds}
    first.push(job.draw(SIZES[0]))
    job.server.check_leases()
    assert not first.received and job.server.shards[0].version == rounds
    restarted = time.monotonic()
    while not first.received and time.monotonic() < restarted + 20:
        time.sleep(0.01)  # the server must have polled: its own stalls extend the lease
        first.send(Header(MessageType.HEARTBEAT))
        job.server.check_leases()
        first.receive()
    assert time.monotonic() > restarted + 0.75 * lease
    assert first.pop_reply()[0].version == rounds + 1


def test_log_truncated_anywhere_is_replayed_to_its_last_complete_record(tmp_path: Path) -> None:
    job = Job(tmp_path, "async")
    ends = []
    record = job.server.aggregator._record_update

    def note_the_end(*update: Any) -> None:
        record(*update)
        ends.append(job.update_log.nbytes)

    job.server.aggregator._record_update = note_the_end
    job.work(2)
    job.update_log.close()
    path = tmp_path / "log-00000000"
    whole = path.read_bytes()
    assert len(whole) == job.update_log.nbytes
    assert len(ends) == 8
    for length in range(0, len(whole) + 1, 3):
        path.write_bytes(whole[:length] + bytes(len(whole) - length + 100))  # preallocated blocks
        updates = sum(shard.version for shard in job.again().shards.values())
        # The last byte may be 0, as the preallocated ones are.
        assert updates in {sum(end <= length + more for end in ends) for more in (0, 1)}


def test_damaged_log_ends_there_and_missing_log_is_an_error(tmp_path: Path) -> None:
    job = Job(tmp_path, "async")
    job.work(1)
    path = tmp_path / "log-00000000"
    whole = path.read_bytes()
    place = whole.index(b'"version": 1')
    path.write_bytes(whole[:place] + b'"version": 7' + whole[place + 12 :])
    assert sum(shard.version for shard in job.again().shards.values()) == 2
    path.write_bytes(whole)
    saved = update_log.server_state(job.server)
    job.update_log.start(job.server, 1)
    job.work(1)
    job.update_log.start(job.server, 2)
    job.work(1)
    (tmp_path / "log-00000001").unlink()
    with pytest.raises(HpcsgdError, match="does not continue the checkpoint"):
        job.again(1, saved)
