"""Small messages outside every collective: questions that a rank answers whatever it is doing, and news."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

_QUESTION, _ANSWER, _NEWS = 1, 2, 3
_PATIENCE = 2.0  # seconds


class Mail:
    """Questions and answers over a communicator of their own.

    Answers come from whichever thread of the other rank happens to poll: the communication thread
    when it waits or idles. A rank that is stopped, or whose threads are all in native code, does not
    answer.

    Parameters
    ----------
    comm
        An mpi4py communicator used for nothing else.
    answer
        What to say to a question.

    Attributes
    ----------
    news
        The last that each rank has told, and when it came.
    """

    def __init__(self, comm: Any, answer: Callable[[Any], Any]) -> None:
        self.news: dict[int, tuple[float, Any]] = {}
        self._comm = comm
        self._answer = answer
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._asked = 0
        self._answers: dict[int, Any] = {}
        self._sent: list[Any] = []

    def poll(self) -> None:
        """Answer the questions that have arrived and keep the answers."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            while self._comm.Iprobe(tag=_QUESTION):
                asker, (number, question) = self._receive(_QUESTION)
                self._send(asker, _ANSWER, (number, self._answer(question)))
            while self._comm.Iprobe(tag=_ANSWER):
                rank, (number, answer) = self._receive(_ANSWER)
                if number == self._asked:
                    self._answers[rank] = answer
            while self._comm.Iprobe(tag=_NEWS):
                rank, told = self._receive(_NEWS)
                self.news[rank] = time.monotonic(), told
            self._sent = [entry for entry in self._sent if not entry[0].Test()]
        finally:
            self._lock.release()

    def ask(self, ranks: Iterable[int], question: Any, patience: float = _PATIENCE) -> dict[int, Any]:
        """The answers of those other ranks that have given one after `patience` seconds."""
        others = set(ranks) - {self._comm.rank}
        with self._asking:
            with self._lock:
                self._asked += 1
                self._answers = {}
                for rank in others:
                    self._send(rank, _QUESTION, (self._asked, question))
            give_up = time.monotonic() + patience
            while len(self._answers) < len(others) and time.monotonic() < give_up:
                self.poll()
                time.sleep(0.005)
            return dict(self._answers)

    def tell(self, rank: int, news: Any) -> None:
        """Tell a rank something that need not be answered."""
        with self._lock:
            self._send(rank, _NEWS, news)

    def _send(self, rank: int, tag: int, content: Any) -> None:
        message = bytearray(pickle.dumps(content))
        self._sent.append((self._comm.Isend([message, len(message)], rank, tag), message))

    def _receive(self, tag: int) -> tuple[int, Any]:
        from mpi4py import MPI

        status = MPI.Status()
        content = self._comm.recv(source=MPI.ANY_SOURCE, tag=tag, status=status)
        return status.Get_source(), content
