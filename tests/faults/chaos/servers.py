"""A server and its groups as jobs of their own: none of the updates that a group knows of is lost."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from math import inf
from pathlib import Path

from tests.faults.chaos.hand import Fault
from tests.faults.chaos.hosts import LinkedHosts
from tests.faults.chaos.job import Job, Place, Undo
from tests.faults.chaos.journal import Journal
from tests.faults.chaos.program import Program, send
from tests.faults.chaos.training import SMALL

MODES = ("serve sync", "serve async", "serve elastic", "serve async ef+maxnorm:bits=4")
_EPOCHS = 10
_LEASE, _LINGER = 2, 5  # seconds
_RESUMED = re.compile(r"resumed after ([\d,]+) updates")


class ServerJob(Job):
    """A server, and two groups of one rank each.

    Parameters
    ----------
    hosts
        Hosts of the groups, whose links can be cut; None: this one.
    """

    def __init__(self, number: int, place: Place, methods: Iterator[str], hosts: LinkedHosts | None) -> None:
        super().__init__(number, place, methods)
        self._hosts = hosts
        self._within: list[list[str]] = hosts.within if hosts else [[], []]
        if hosts is not None:
            self.kinds = (*self.kinds, "cut")
        self._grown, self._parts = [0] * len(self._within), 0
        self._journals: list[Journal] = []

    @property
    def programs(self) -> Sequence[Program]:
        return [self._server, *self._groups]

    def progress(self) -> Sequence[float]:
        growth = [grown + journal.growth for grown, journal in zip(self._grown, self._journals, strict=True)]
        return [inf if done else grown for grown, done in zip(growth, self._done(), strict=True)]

    def parts(self) -> int:
        return self._parts + sum(len(journal.parts) for journal in self._journals)

    def read(self) -> None:
        self._check_server()
        for journal in self._journals:
            journal.read()

    def _done(self) -> list[bool]:
        return [(self._folder / f"group{group}" / "done").exists() for group in range(len(self._groups))]

    def _begin(self) -> None:
        self._folder = self.disk / self.name
        self._folder.mkdir()
        _, mode, *scheme = self.method.split(" ")
        listen = self._folder / "servers"
        serve = ["hpcsgd", "serve", "--listen", listen, "--mode", mode, "--progress", "plain"]
        serve += [
            "--lease",
            _LEASE,
            "--linger",
            _LINGER,
            "--groups",
            len(self._within),
            "--checkpoint-every",
            3,
        ]
        serve += ["--bind", self._hosts.address] if self._hosts else []
        self._server = self._program("server", serve)
        self._versions: dict[str, int] = {}
        self._resumed = self._records = 0
        self._groups, self._journals = [], []
        for group, within in enumerate(self._within):
            name = f"group{group}"
            words = [
                "--strategy",
                f"ps:mode={mode}",
                "--connect",
                listen,
                "--compress",
                *(scheme or ["none"]),
            ]
            words += [*SMALL, "--epochs", _EPOCHS, "--seed", group, "--out", self._folder, "--name", name]
            spare = self.place.folder / "spare" / self.name / name
            words += ["--resume", "auto", "--spare", spare]
            program = self._program(name, [*within, "hpcsgd", "train", *words])
            self._groups.append(program)
            self._journals.append(Journal(self._folder / name, spare, lambda program=program: program.text))
        self._all_done = 0.0
        for each in self.programs:
            each.start()

    def _program(self, name: str, command: Sequence[object]) -> Program:
        output = self.place.folder / f"{self.name}-{name}.txt"
        return Program(command, output, self.place.folder, {"PATH": self.place.path})

    def _tick(self) -> None:
        done = self._done()
        for program, ended in zip(self._groups, done, strict=True):
            if not ended:
                self._start_again(program)
        if not all(done):
            self._start_again(self._server)
            self._all_done = time.monotonic()
        elif self._server.status() is None and time.monotonic() - self._all_done > 2 * _LINGER:
            # A server that was killed after the groups had ended waits for further ones.
            for pid in self._server.python_pids():
                send(pid, signal.SIGTERM)

    def _is_finished(self) -> bool:
        return all(self._done()) and all(program.status() is not None for program in self.programs)

    def _cut(self, fault: Fault) -> Undo:
        assert self._hosts is not None
        return self._hosts.cut(fault, self._hosts.groups)

    def _check_server(self) -> None:
        """Check that the numbers of updates never fall, also when the server starts again."""
        resumed = [int(number.replace(",", "")) for number in _RESUMED.findall(self._server.text)]
        for number in resumed[self._resumed :]:
            known = sum(self._versions.values())
            assert number >= known, (
                f"updates are lost: the server resumed after {number}, and had made {known}"
            )
        self._resumed = len(resumed)
        records = _records(self._folder / "servers.checkpoint" / "server-0" / "metrics.jsonl")
        for record in records[self._records :]:
            lost = {k: v for k, v in self._versions.items() if record["versions"].get(k, 0) < v}
            assert not lost, f"updates are lost: {self._versions}, then {record['versions']}"
            self._versions = record["versions"]
        self._records = len(records)

    def _check_end(self) -> None:
        for journal in self._journals:
            journal.check_end(synchronous=False)
        if "async" in self.method:
            taken = sum(
                journal.taken + journal.last_step - journal.parts[-1].start for journal in self._journals
            )
            for shard, version in self._versions.items():
                assert version >= taken, f"the groups have pushed {taken} times, shard {shard} has {version}"
        self._grown = [a + b.growth for a, b in zip(self._grown, self._journals, strict=True)]
        self._parts = self.parts()


def _records(path: Path) -> list[dict[str, dict[str, int]]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]


def methods() -> Iterator[str]:
    """The modes of servers, again and again."""
    return cycle(MODES)
