"""A watchdog process for each rank, which kills it when a test takes too long.

A hang in native code may hold the GIL, so no thread of the rank itself can report it reliably.
The rank's faulthandler writes its stacks to a file; this process prints them with the names of rank
and test, and then kills the rank, at which the launcher ends the job.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

_NOISE = ("/_pytest/", "/pluggy/", "frozen runpy")
_DUMP_DELAY, _PRINT_DELAY = 0.5, 2.0  # seconds: to write the stacks, and for all ranks to print theirs


class Watchdog:
    """Kills this process when no other call follows `watch(test, seconds)` in that time."""

    def __init__(self, rank: int) -> None:
        self._stacks = tempfile.NamedTemporaryFile("w+b")  # noqa: SIM115
        command = [sys.executable, "-S", __file__, str(rank), str(os.getpid()), self._stacks.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def watch(self, test: str, seconds: float) -> None:
        self._stacks.truncate(0)
        self._stacks.seek(0)
        faulthandler.dump_traceback_later(seconds, file=self._stacks)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds} {test}\n")
        self._process.stdin.flush()


def main(rank: str, pid: int, stacks: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    deadline, test, pending = None, "", b""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if select.select([0], [], [], left)[0]:
            data = os.read(0, 65536)
            if not data:
                return
            *lines, pending = (pending + data).split(b"\n")
            if lines:
                seconds, _, test = lines[-1].decode().partition(" ")
                deadline = time.monotonic() + float(seconds)
            continue
        time.sleep(_DUMP_DELAY)
        with open(stacks) as file:
            lines = [line for line in file if not any(word in line for word in _NOISE)]
        text = "".join(f"[rank {rank}] {line}" for line in lines)
        os.write(2, f"\nrank {rank}: no end of {test} after {seconds} s\n{text}".encode())
        time.sleep(_PRINT_DELAY)
        os.kill(pid, signal.SIGKILL)
        return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
