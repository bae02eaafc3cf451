"""Activity records: the last operation of each process, in memory that other processes of its machine can
read when it does not answer."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

from hpcsgd.diagnostics import procfs
from hpcsgd.errors import DeadlineExceeded

#: Time of the last change (the machine's monotonic clock), 1 for an operation in flight, its name, the step,
#: the work that keeps the rank busy, the phase of its start, and the signal at which it writes its stacks.
_RECORD = struct.Struct("=dq256sq64s64sq")
_OPERATION = struct.Struct("=dq256s")
_STEP = _OPERATION.size // 8
_BUSY = slice(_OPERATION.size + 8, _OPERATION.size + 72)
_PHASE = slice(_BUSY.stop, _BUSY.stop + 64)
_NAME = "hpcsgd-"  # of the file; a unique number follows
_END = "at its end"  # a phase
_PAGE = 4096  # of the record; stack dumps follow
_DESCRIPTORS = 4096  # the table of a process's descriptors has the size of the highest
_SIGNALS = range(signal.SIGRTMAX - 3, signal.SIGRTMIN, -1)
_DUMP_TIMEOUT, _DUMP_QUIET, _DUMP_POLL = 1.0, 0.05, 0.01  # seconds


@dataclass(frozen=True)
class ProcessInfo:
    """Where other processes of the machine find this one's record."""

    #: Its machine and its process id there.
    host: str
    pid: int
    #: Its file descriptor of the record, and the record's name, which is unique.
    fd: int
    file: str
    signal: int  # signal at which it appends its threads' stacks to the record; 0: none
    #: Its file descriptor of the reading end of a pipe, of which it alone has the other end; -1: not known.
    end: int = -1

    def record_of(self, pid: int) -> str | None:
        """Return the path of the record, if process `pid` is this one or has been forked from it."""
        path = f"/proc/{pid}/fd/{self.fd}"
        with contextlib.suppress(OSError):
            return path if os.readlink(path).startswith(f"/memfd:{self.file} ") else None
        return None

    @staticmethod
    def find(pid: int) -> ProcessInfo | None:
        """Find the record of a process of this machine that has not sent where it is; None without one."""
        with contextlib.suppress(OSError, struct.error):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                file = os.readlink(f"/proc/{pid}/fd/{fd}")
                if file.startswith(f"/memfd:{_NAME}"):
                    with open(f"/proc/{pid}/fd/{fd}", "rb") as record:
                        *_, number = _RECORD.unpack(record.read(_RECORD.size))
                    file = file.removeprefix("/memfd:").split()[0]
                    return ProcessInfo(socket.gethostname(), pid, int(fd), file, number)
        return None


@dataclass(frozen=True)
class LastActivity:
    """The last recorded activity of a rank."""

    ago: float  # seconds since an operation or a step began or ended
    step: int
    #: The last operation, and whether it is still in flight.
    operation: str
    in_flight: bool
    busy: str = ""  # long work of this rank alone, for which the others wait; "": none
    phase: str = ""  # work in which it may answer no other rank; "": none


class ActivityRecord:
    """The current operation and step of this process, recorded at every change."""

    def __init__(self) -> None:
        self._memory = _record()[1]
        # Packed for every operation: this takes a fraction of a microsecond.
        self._pack = partial(_OPERATION.pack_into, self._memory, 0)
        words = memoryview(self._memory)[: _RECORD.size]
        self._floats, self._integers = words.cast("d"), words.cast("q")
        self.step = 0

    @property
    def step(self) -> int:
        return self._integers[_STEP]

    @step.setter
    def step(self, step: int) -> None:
        self._integers[_STEP] = step
        self._floats[0] = time.perf_counter()

    def begin(self, operation: str, now: float) -> None:
        """Record the begin of an operation of the communication thread, at `now` of `time.perf_counter`."""
        self._pack(now, 1, operation.encode())

    def end(self, now: float) -> None:
        """Record its end."""
        self._integers[1], self._floats[0] = 0, now

    @property
    def busy(self) -> str:
        """Long work of this rank alone, for which the others wait; "": none."""
        return _read(self._memory).busy

    @busy.setter
    def busy(self, work: str) -> None:
        _write(self._memory, _BUSY, work)

    def last(self) -> LastActivity:
        """Return the last activity."""
        return _read(self._memory)


def begin_phase(work: str) -> None:
    """Let the record of this process name its work, until the end of the next `phase`."""
    this_process()  # which others find
    _set_phase(work)


@contextmanager
def phase(work: str) -> Iterator[None]:
    """Context of work in which this process may answer no other one, which its record names.

    Such as "importing numba", which holds Python's lock.
    """
    given_up = False
    begin_phase(work)
    try:
        yield
    except DeadlineExceeded:
        # Ranks whose deadlines pass a moment later still look.
        given_up = True
        raise
    finally:
        if not given_up:
            _set_phase("")


def end_in_order(how: str) -> None:
    """Record that this process ends by itself, and how: "it ends the job"; not in one without a record."""
    if _record.cache_info().currsize:
        _set_phase(f"{_END}: {how}")


def has_ended_in_order(last: LastActivity) -> bool:
    """Return whether a process has recorded that it ends by itself."""
    return last.phase.startswith(_END)


class ProcessView:
    """A process of this machine, or this one, observed without its cooperation.

    Raises
    ------
    OSError
        It is not on this machine, or its record cannot be read.
    """

    def __init__(self, info: ProcessInfo) -> None:
        path = info.record_of(info.pid)
        if path is None:
            raise ProcessLookupError(f"process {info.pid} of {info.host} is not on this machine")
        self.info = info
        with open(path, "rb") as file:
            # Mapped now, so that it can be read after the process has ended.
            self._memory = mmap.mmap(file.fileno(), _PAGE, access=mmap.ACCESS_READ)

    def last(self) -> LastActivity:
        """Return its last activity."""
        return _read(self._memory)

    def stacks(self, pid: int) -> str:
        """Return the stacks of all Python threads of the process or of one forked from it; "" if unavailable.

        Interrupts system calls of another process. Its threads run while their stacks are read, which can end
        it: a process that answers is to be asked for its own.
        """
        path = self.info.record_of(pid)
        if path is not None and pid == os.getpid():
            return self._own_stacks(path)
        caught = procfs.signals(pid, "SigCgt") - procfs.signals(pid, "SigBlk")
        if path is None or self.info.signal not in caught:
            return ""  # the signal would end the process
        with contextlib.suppress(OSError), open(path, "rb") as file:
            start = size = os.fstat(file.fileno()).st_size
            os.kill(pid, self.info.signal)
            began = changed = time.monotonic()
            while (now := time.monotonic()) - began < _DUMP_TIMEOUT:
                if size != os.fstat(file.fileno()).st_size:
                    size, changed = os.fstat(file.fileno()).st_size, now
                if size > start and now - changed > _DUMP_QUIET:
                    break
                time.sleep(_DUMP_POLL)
            file.seek(start)
            return file.read().decode(errors="replace")
        return ""

    def _own_stacks(self, path: str) -> str:
        """The stacks of this process, read while it holds Python's lock, so that no other thread runs."""
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            faulthandler.dump_traceback(self.info.fd, all_threads=True)
            return file.read().decode(errors="replace")


@cache
def this_process() -> ProcessInfo:
    """Return this process; it appends its stacks to its record at a signal that was unused."""
    fd, memory, file = _record()
    used = procfs.signals(os.getpid(), "SigCgt", "SigIgn", "SigBlk")
    free = next((number for number in _SIGNALS if number not in used), 0)
    if free:
        faulthandler.register(free, fd, all_threads=True, chain=False)
    struct.pack_into("=q", memory, _RECORD.size - 8, free)
    return ProcessInfo(socket.gethostname(), os.getpid(), fd, file, free, _end())


def _end() -> int:
    """Return the reading end of a pipe, whose other end closes with this process before its parts of MPI."""
    end, low = os.pipe()
    # A killed process closes the highest descriptor first.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    other_end = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, min(limit, _DESCRIPTORS) // 2)
    os.close(low)
    # An object, which closes once: a child of a child may use the number for another file.
    os.register_at_fork(after_in_child=os.fdopen(other_end, "wb").close)
    return end


def _read(memory: mmap.mmap) -> LastActivity:
    when, in_flight, operation, step, busy, phase, _ = _RECORD.unpack_from(memory)
    texts = [text.rstrip(b"\0").decode(errors="replace") for text in (operation, busy, phase)]
    return LastActivity(time.perf_counter() - when, step, texts[0], bool(in_flight), *texts[1:])


def _write(memory: mmap.mmap, place: slice, text: str) -> None:
    size = place.stop - place.start
    memory[place] = text.encode()[:size].ljust(size, b"\0")


def _set_phase(work: str) -> None:
    memory = _record()[1]
    _write(memory, _PHASE, work)
    struct.pack_into("=d", memory, 0, time.perf_counter())


@cache
def _record() -> tuple[int, mmap.mmap, str]:
    file = f"{_NAME}{uuid.uuid4().hex}"
    fd = os.memfd_create(file)
    os.ftruncate(fd, _PAGE)
    os.lseek(fd, _PAGE, os.SEEK_SET)
    return fd, mmap.mmap(fd, _PAGE), file
