"""Small messages outside every collective: who waits too long asks the others what they are doing."""

from __future__ import annotations

import pickle
import sys
import threading
import time
import traceback
from typing import Any

_QUESTION, _ANSWER = 1, 2
_PATIENCE = 2.0  # seconds
_MAX_STACK = 12


class Status:
    """What this rank is doing, kept for the moment somebody asks."""

    def __init__(self) -> None:
        self.step = 0
        self.communication = "nothing in flight"
        self._user = threading.main_thread().ident

    def describe(self) -> str:
        frames = sys._current_frames()
        frame = frames.get(self._user) if self._user is not None else None
        stack = "".join(traceback.format_stack(frame)[-_MAX_STACK:]) if frame else "  (no stack)\n"
        return f"step {self.step}, communication: {self.communication}; its main thread:\n{stack}"


class Mail:
    """Questions and answers over a communicator of their own.

    Answers come from whichever thread of the other rank happens to poll: the communication thread
    when it waits or idles. A rank that is stopped, or whose threads are all in native code, does not
    answer, and that is reported as such.

    Parameters
    ----------
    comm
        An mpi4py communicator used for nothing else.
    status
        What to answer.
    """

    def __init__(self, comm: Any, status: Status) -> None:
        self._comm = comm
        self._status = status
        self._lock = threading.Lock()
        self._answers: dict[int, str] = {}
        self._sent: list[Any] = []

    def poll(self) -> None:
        """Answer the questions that have arrived and keep the answers."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            while self._comm.Iprobe(tag=_QUESTION):
                asker = self._receive(_QUESTION)[0]
                self._send(asker, _ANSWER, self._status.describe())
            while self._comm.Iprobe(tag=_ANSWER):
                rank, text = self._receive(_ANSWER)
                self._answers[rank] = text
            self._sent = [entry for entry in self._sent if not entry[0].Test()]
        finally:
            self._lock.release()

    def ask_all(self) -> str:
        """What every rank is doing, one paragraph each; waits two seconds at most."""
        others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
        self._answers.clear()
        with self._lock:
            for rank in others:
                self._send(rank, _QUESTION, "")
        give_up = time.monotonic() + _PATIENCE
        while len(self._answers) < len(others) and time.monotonic() < give_up:
            self.poll()
            time.sleep(0.005)
        silent = f"did not answer within {_PATIENCE:g} s: stopped, gone, or in native code"
        lines = [f"rank {self._comm.rank} (this one): {self._status.describe()}"]
        lines += [f"rank {rank}: {self._answers.get(rank, silent)}" for rank in others]
        return "\n".join(line.rstrip() for line in lines)

    def _send(self, rank: int, tag: int, text: str) -> None:
        message = bytearray(pickle.dumps(text))
        self._sent.append((self._comm.Isend([message, len(message)], rank, tag), message))

    def _receive(self, tag: int) -> tuple[int, str]:
        from mpi4py import MPI

        status = MPI.Status()
        text: str = self._comm.recv(source=MPI.ANY_SOURCE, tag=tag, status=status)
        return status.Get_source(), text
