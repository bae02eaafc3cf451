"""What a rank does, kept in memory that its neighbours can read when it cannot answer."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import signal
import socket
import struct
import time
import uuid
from dataclasses import dataclass
from functools import cache, partial

from hpcsgd.diagnostics import procfs

#: When it last moved (the clock of the machine), whether the operation goes on, its name, the step.
_RECORD = struct.Struct("=dq256sq")
_OPERATION = struct.Struct("=dq256s")
_STEP = _OPERATION.size // 8
_PAGE = 4096  # of the record; stacks follow
_SIGNALS = range(signal.SIGRTMAX - 3, signal.SIGRTMIN, -1)
_WRITTEN, _AT_REST, _GLANCE = 1.0, 0.05, 0.01  # seconds


@dataclass(frozen=True)
class Card:
    """How the other processes of a machine find one.

    Attributes
    ----------
    host, pid
        Its machine and its id there.
    fd, file
        Its descriptor of the memory, and what that memory is called: no other process has one of this name.
    signal
        What makes it write its threads' stacks there; 0: nothing does.
    """

    host: str
    pid: int
    fd: int
    file: str
    signal: int

    def memory_of(self, pid: int) -> str | None:
        """The path of the memory, where process `pid` is this one or has been forked from it."""
        path = f"/proc/{pid}/fd/{self.fd}"
        with contextlib.suppress(OSError):
            return path if os.readlink(path).startswith(f"/memfd:{self.file} ") else None
        return None


@dataclass(frozen=True)
class Moved:
    """The last thing that a rank is known to have done.

    Attributes
    ----------
    ago
        Seconds since it began or ended an operation or a step.
    operation, in_flight
        The last operation, and whether it goes on.
    """

    ago: float
    step: int
    operation: str
    in_flight: bool


class Status:
    """What this process is doing, written down at every change."""

    def __init__(self) -> None:
        self._memory = _recorder()[1]
        # This is done for every operation, and takes a fraction of a microsecond.
        self._pack = partial(_OPERATION.pack_into, self._memory, 0)
        numbers = memoryview(self._memory)[: _RECORD.size]
        self._when, self._numbers = numbers.cast("d"), numbers.cast("q")
        self.step = 0

    @property
    def step(self) -> int:
        return self._numbers[_STEP]

    @step.setter
    def step(self, step: int) -> None:
        self._numbers[_STEP] = step
        self._when[0] = time.perf_counter()

    def begin(self, operation: str, now: float) -> None:
        """An operation of the communication thread begins; `now` is of `time.perf_counter`."""
        self._pack(now, 1, operation.encode())

    def end(self, now: float) -> None:
        """It is over."""
        self._numbers[1], self._when[0] = 0, now

    def moved(self) -> Moved:
        """The last operation."""
        return _moved(self._memory)


class Neighbour:
    """A process of this machine, this one perhaps, as seen without its help.

    Parameters
    ----------
    card
        Its own.

    Raises
    ------
    OSError
        It is not on this machine, or cannot be looked into.
    """

    def __init__(self, card: Card) -> None:
        path = card.memory_of(card.pid)
        if path is None:
            raise ProcessLookupError(f"process {card.pid} of {card.host} is not here")
        self.card = card
        with open(path, "rb") as file:
            # Mapped now: it can be read when the process is gone.
            self._memory = mmap.mmap(file.fileno(), _PAGE, access=mmap.ACCESS_READ)

    def moved(self) -> Moved:
        """Its last operation."""
        return _moved(self._memory)

    def stacks(self, pid: int) -> str:
        """What all Python threads of the process, or of one forked from it, do; "" where that is not known.

        It interrupts system calls of that process.
        """
        path = self.card.memory_of(pid)
        caught = procfs.signals(pid, "SigCgt") - procfs.signals(pid, "SigBlk")
        if path is None or self.card.signal not in caught:
            return ""  # the signal would end it
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = size = os.fstat(file.fileno()).st_size
            os.kill(pid, self.card.signal)
            began = changed = time.monotonic()
            while (now := time.monotonic()) - began < _WRITTEN:
                if size != os.fstat(file.fileno()).st_size:
                    size, changed = os.fstat(file.fileno()).st_size, now
                if size > start and now - changed > _AT_REST:
                    break
                time.sleep(_GLANCE)
            file.seek(start)
            return file.read().decode(errors="replace")
        return ""


@cache
def card() -> Card:
    """This process's; makes it write its stacks where it is asked to by a signal that nobody uses."""
    fd, _, file = _recorder()
    used = procfs.signals(os.getpid(), "SigCgt", "SigIgn", "SigBlk")
    free = next((number for number in _SIGNALS if number not in used), 0)
    if free:
        faulthandler.register(free, fd, all_threads=True, chain=False)
    return Card(socket.gethostname(), os.getpid(), fd, file, free)


def _moved(memory: mmap.mmap) -> Moved:
    when, in_flight, operation, step = _RECORD.unpack_from(memory)
    name = operation.rstrip(b"\0").decode(errors="replace")
    return Moved(time.perf_counter() - when, step, name, bool(in_flight))


@cache
def _recorder() -> tuple[int, mmap.mmap, str]:
    file = f"hpcsgd-{uuid.uuid4().hex}"
    fd = os.memfd_create(file)
    os.ftruncate(fd, _PAGE)
    os.lseek(fd, _PAGE, os.SEEK_SET)
    return fd, mmap.mmap(fd, _PAGE), file
