"""A server that is made again from what the last one has written down is that server, bit for bit."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpcsgd import HpcsgdError
from hpcsgd.server import Policy, Server, update_log
from hpcsgd.server.protocol import Head, Kind
from tests.support.protocol_clients import Talker, contract_of

SIZES = [5, 3]
OPTIONS = {"SGD": [{"lr": 0.1, "momentum": 0.9}], "Adam": [{"lr": 0.1, "betas": [0.9, 0.99]}]}
MODES = [("sync", "SGD"), ("async", "Adam"), ("elastic", "SGD")]


class Job:
    """Servers that follow each other, and two clients."""

    def __init__(self, folder: Path, mode: str, optimizer: str = "SGD", lease: float = 10.0) -> None:
        self.folder, self.policy = folder, Policy(mode, lease=lease)
        self.contract, self.options = contract_of(SIZES, mode, optimizer=optimizer), OPTIONS[optimizer]
        self.random = np.random.default_rng(1)
        self.keeping = update_log.Keeping(folder)
        self.server = Server(self.policy, record=self.keeping.record)
        self.keeping.begin(self.server, 0)
        self.clients = [self.come(name) for name in "ab"]
        for shard, size in enumerate(SIZES):
            self.clients[0].fill(self.draw(size), shard)
            self.clients[1].fetch(shard)

    def come(self, name: str) -> Talker:
        return Talker(self.server, name, self.contract, self.options)

    def draw(self, size: int) -> np.ndarray:
        return self.random.standard_normal(size).astype(np.float32)

    def work(self, rounds: int) -> None:
        for _ in range(rounds):
            for client in self.clients:
                for shard, size in enumerate(SIZES):
                    client.push(self.draw(size), shard, weight=1 + 2 * shard)
            for client in self.clients:
                client.listen()
                assert [head.shard for head, _ in client.heard] == [0, 1]
                client.heard.clear()
        self.keeping.note()

    def again(self, since: int = 0, saved: dict[str, Any] | None = None) -> Server:
        """Another server, from a state and what is logged since."""
        server = Server(self.policy)
        if saved is not None:
            update_log.restore(server, saved)
        update_log.Keeping(self.folder).replay(server, since)
        return server


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """A nested state as one flat dict, tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return {key: value.numpy().tobytes()}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for name, item in items for k, v in leaves(item, f"{key}/{name}").items()}
    return {key: value}


def known(server: Server) -> dict[str, Any]:
    """All that must survive: figures are those of the last state."""
    found = leaves(update_log.state(server))
    return {key: value for key, value in found.items() if "staleness" not in key and "left_out" not in key}


@pytest.mark.parametrize(("mode", "optimizer"), MODES)
def test_from_the_log_alone_and_from_a_state_in_between(tmp_path: Path, mode: str, optimizer: str) -> None:
    job = Job(tmp_path, mode, optimizer)
    job.work(3)
    assert known(job.again()) == known(job.server)
    saved = update_log.state(job.server)
    job.keeping.begin(job.server, 1)
    assert known(job.again(1, saved)) == known(job.server)
    job.work(2)
    wanted = known(job.server)
    assert known(job.again(1, saved)) == known(job.again(0)) == wanted
    job.keeping.forget(1)
    assert job.keeping.numbers() == [1]
    assert known(job.again(1, saved)) == wanted and wanted != leaves(saved)


def test_a_state_is_not_changed_by_what_comes_after_it(tmp_path: Path) -> None:
    for mode, optimizer in MODES:
        (tmp_path / mode).mkdir()
        job = Job(tmp_path / mode, mode, optimizer)
        job.work(1)
        saved = update_log.state(job.server)
        before = leaves(saved)
        job.work(1)
        assert leaves(saved) == before != leaves(update_log.state(job.server))


@pytest.mark.parametrize("mode", ["sync", "async", "elastic"])
def test_a_push_whose_answer_was_lost_is_not_counted_again(tmp_path: Path, mode: str) -> None:
    job = Job(tmp_path, mode)
    values = {name: job.draw(SIZES[0]) for name in "ab"}
    for client in job.clients:
        client.push(values[client.name])
    job.clients[0].listen()
    answers = {client.name: client.answer() for client in job.clients}
    versions = answers["a"][0].version, answers["b"][0].version
    job.server = job.again()
    for name, (head, values_then) in answers.items():
        client = job.come(name)
        assert client.let_in
        client.push(values[name], 0)
        again, values_now = client.answer()
        if mode == "elastic" or head.version == max(versions):
            assert values_now.tobytes() == values_then.tobytes()
        assert again.version == max(versions) == job.server.shards[0].version


@pytest.mark.parametrize("rounds", [0, 2])
def test_who_was_here_is_waited_for_until_the_lease_is_over(tmp_path: Path, rounds: int) -> None:
    job = Job(tmp_path, "sync", lease=0.2)
    job.work(rounds)
    for client in job.clients:
        client.say(Head(Kind.PULL, 0, steps=1))  # and begins to push
    job.keeping.note()
    job.server = job.again()
    first = job.come("a")
    first.fetch()
    first.rounds = {0: rounds}
    first.push(job.draw(SIZES[0]))
    job.server.watch()
    assert not first.heard and job.server.shards[0].version == rounds
    restarted = time.monotonic()
    while not first.heard and time.monotonic() < restarted + 20:
        time.sleep(
            0.01
        )  # it must have listened: who is not heard by a server that stands still is not silent
        first.say(Head(Kind.BEAT))
        job.server.watch()
        first.listen()
    assert time.monotonic() > restarted + 0.15
    assert first.answer()[0].version == rounds + 1


def test_a_log_may_be_torn_anywhere(tmp_path: Path) -> None:
    job = Job(tmp_path, "async")
    ends = []
    record = job.server.counting._record

    def note_the_end(*update: Any) -> None:
        record(*update)
        ends.append(job.keeping.nbytes)

    job.server.counting._record = note_the_end
    job.work(2)
    job.keeping.close()
    path = tmp_path / "log-00000000"
    whole = path.read_bytes()
    assert len(whole) == job.keeping.nbytes
    assert len(ends) == 8
    for length in range(0, len(whole) + 1, 3):
        path.write_bytes(whole[:length] + bytes(len(whole) - length + 100))  # blocks that were reserved
        updates = sum(shard.version for shard in job.again().shards.values())
        # The last byte may be a zero, which is there in any case.
        assert updates in {sum(end <= length + more for end in ends) for more in (0, 1)}


def test_a_log_that_is_damaged_or_missing_is_an_error_or_ends_there(tmp_path: Path) -> None:
    job = Job(tmp_path, "async")
    job.work(1)
    path = tmp_path / "log-00000000"
    whole = path.read_bytes()
    place = whole.index(b'"version": 1')
    path.write_bytes(whole[:place] + b'"version": 7' + whole[place + 12 :])
    assert sum(shard.version for shard in job.again().shards.values()) == 2
    path.write_bytes(whole)
    saved = update_log.state(job.server)
    job.keeping.begin(job.server, 1)
    job.work(1)
    job.keeping.begin(job.server, 2)
    job.work(1)
    (tmp_path / "log-00000001").unlink()
    with pytest.raises(HpcsgdError, match="does not go on where the state ends"):
        job.again(1, saved)
