"""Concurrent jobs, each with its output in a file, that are killed at the end of the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from tests.support.launch import CLI, UNCOMPILED, _environment, _kill, mpiexec, processes


class Job:
    """A running Python script: one process, or several ranks under mpiexec.

    Parameters
    ----------
    folder
        The working folder, which also receives the output.
    name
        The name of the output file, without `.txt`.
    script, args
        The script and its arguments; by default `hpcsgd` with these arguments.
    ranks
        0: one process without mpiexec.
    options
        Options of mpiexec.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *args: object,
        script: str = CLI + "run()",
        ranks: int = 0,
        options: Sequence[str] = (),
    ) -> None:
        self._mark = uuid.uuid4().hex
        self._output = folder / f"{name}.txt"
        start = [*mpiexec(), *options, "-n", str(ranks)] if ranks else []
        with self._output.open("w") as out:
            self._process = subprocess.Popen(
                [*start, sys.executable, "-c", UNCOMPILED + script, *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=_environment(self._mark, {"HPCSGD_TIMEOUT": "60", "PYTHONUNBUFFERED": "1"}),
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        """The output so far."""
        return self._output.read_text()

    def wait_for(self, text: str, times: int = 1, seconds: float = 80.0) -> None:
        """Wait until the output contains the text `times` times."""
        deadline = time.monotonic() + seconds
        while self.text.count(text) < times:
            assert time.monotonic() < deadline, f"no {text!r} in {self._output.name}:{self._outputs()}"
            time.sleep(0.05)

    def wait_for_more(self, text: str, times: int) -> None:
        """Wait until the output contains the text `times` times more than now."""
        self.wait_for(text, self.text.count(text) + times)

    def _outputs(self) -> str:
        """The end of the output of all jobs of the folder."""
        outputs = sorted(self._output.parent.glob("*.txt"))
        return "".join(f"\n== {output.name}\n{output.read_text()[-2000:]}" for output in outputs)

    def send(self, number: int) -> None:
        """Send a signal to its Python processes."""
        for pid in self.pids():
            os.kill(pid, number)

    def kill(self, pid: int) -> None:
        """Kill one of its processes."""
        os.kill(pid, signal.SIGKILL)

    def pids(self) -> list[int]:
        """Return the ids of its Python processes."""
        launchers = ("mpiexec", "hydra", "prte")
        found = processes(self._mark).items()
        return [pid for pid, command in found if not any(name in command for name in launchers)]

    def end(self, seconds: float = 80.0) -> int:
        """Wait for its end; returns the exit status."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self._output.name} still runs after {seconds} s:{self._outputs()}"
            ) from None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self._mark)
        self._process.wait()
