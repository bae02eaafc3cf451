"""A program of a trial: its processes, which the hand picks from, and its output over all starts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.launch import CLI, UNCOMPILED, _environment, processes

ROOT = Path(__file__).parents[3]
_RANK = re.compile(rb"\0(?:PMI_RANK|OMPI_COMM_WORLD_RANK)=(\d+)\0")
_LAUNCHERS = re.compile(r"\b(mpiexec|hydra_pmi_proxy|prterun|prte|prted|bash|sh|launcher|ip|unshare)\b")


def write_hpcsgd(folder: Path) -> Path:
    """Write a command `hpcsgd` that imports nothing that short runs do not need; returns its folder."""
    (folder / "start.py").write_text(f"{UNCOMPILED}{CLI}run()\n")
    command = folder / "hpcsgd"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/start.py" "$@"\n')
    command.chmod(0o755)
    return folder


class Program:
    """A command that is started again and again, in a session of its own.

    Parameters
    ----------
    command
        The command and its arguments.
    output
        File to which its output is appended.
    folder
        The working folder.
    variables
        Further environment variables.

    Attributes
    ----------
    starts, started_at
        Number of starts, and the time of the last one.
    """

    def __init__(
        self, command: Sequence[object], output: Path, folder: Path, variables: Mapping[str, str]
    ) -> None:
        self._command, self._output, self._folder = [*map(str, command)], output, folder
        self._variables = {"PYTHONUNBUFFERED": "1", **variables}
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = ""
        self.starts, self.started_at = 0, 0.0
        output.touch()

    @property
    def text(self) -> str:
        """The output of all starts."""
        return self._output.read_text(errors="replace")

    def start(self) -> None:
        """Start it; the processes of an earlier start are ended first."""
        self.kill()
        self._mark = uuid.uuid4().hex
        self.starts, self.started_at = self.starts + 1, time.monotonic()
        with self._output.open("ab") as out:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=_environment(self._mark, self._variables),
                start_new_session=True,
            )

    def status(self) -> int | None:
        """The exit status of the last start; None while it runs."""
        return self._process.poll() if self._process is not None else None

    def pids(self) -> list[int]:
        """Its Python processes, in order of rank, and then its launchers."""
        found = processes(self._mark) if self._mark else {}
        launchers = {pid for pid, command in found.items() if _LAUNCHERS.search(command.split(" ")[0])}
        return [*sorted(found.keys() - launchers, key=_rank), *sorted(launchers)]

    def python_pids(self) -> list[int]:
        """Its Python processes, in order of rank."""
        found = processes(self._mark) if self._mark else {}
        ours = (pid for pid, command in found.items() if "start.py" in command)
        return sorted((pid for pid in ours if not _LAUNCHERS.search(found[pid].split(" ")[0])), key=_rank)

    def kill(self) -> None:
        """End all its processes at once."""
        while self._mark and (found := processes(self._mark)):
            for pid in found:
                send(pid, signal.SIGKILL)
            if self._process is not None:
                self._process.poll()
        if self._process is not None:
            self._process.wait()


def send(pid: int, number: int) -> bool:
    """Send a signal; returns whether the process exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def _rank(pid: int) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        if found := _RANK.search(Path(f"/proc/{pid}/environ").read_bytes()):
            return int(found[1]), pid
    return -1, pid
