"""A job of a trial: its runs, the faults that it can have, and what must hold after each."""

from __future__ import annotations

import re
import shutil
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults.chaos.hand import Fault
from tests.faults.chaos.program import Program, send

#: What ends a fault: SIGCONT, free space, a link that is up again.
Undo = Callable[[], object]
_AGAIN = 0.5  # seconds between two starts of a program
_ASK_AGAIN = 3.0  # seconds between two requests to end
#: A program that ends so many seconds after the last fault ends by itself.
_AFTERMATH = 60.0
_LAST_LINES = re.compile(
    r"^(\w[\w.]*(?:Error|Exception|Exceeded|Failed|Left|Disagreement|BadOption)): ", re.M
)


@dataclass(frozen=True)
class Place:
    """Where the jobs of a trial run.

    Attributes
    ----------
    folder
        Folder of all files but those on the job's disk.
    disks
        A small file system for each job, by its number; none where these cannot be mounted.
    path
        Value of PATH, with `hpcsgd` and mpiexec.
    """

    folder: Path
    disks: Mapping[int, Path]
    path: str


class Job(ABC):
    """A job that is repeated with other methods, for as long as the trial lasts.

    Parameters
    ----------
    number
        Its number in the trial.
    place
        Where it runs.
    methods
        The methods, one after another and then again.

    Attributes
    ----------
    kinds
        The kinds of faults that it can have.
    disk
        The folder of its runs.
    method
        The current method.
    ended
        Number of runs that have reached their end.
    hurt_at
        Time at which its last fault began or ended.
    errors
        Types of the exceptions that ended ranks.
    """

    kinds: tuple[str, ...] = ("kill", "crash", "stop", "end")

    def __init__(self, number: int, place: Place, methods: Iterator[str]) -> None:
        self.number, self.place, self._methods = number, place, methods
        self.disk = place.disks.get(number, place.folder)
        if number in place.disks:
            self.kinds = (*self.kinds, "fill")
        self.method = ""
        self.ended = self._runs = 0
        self.errors: Counter[str] = Counter()
        self.hurt_at = time.monotonic()
        self._closing = False

    @property
    def name(self) -> str:
        """The name of the current run, unique in the trial."""
        return f"{self.number}-{self._runs}"

    def begin(self) -> None:
        """Begin a run with the next method."""
        self.method = next(self._methods)
        self._runs += 1
        self._begin()

    def tick(self) -> None:
        """Start again what has ended, and check what must hold at any time.

        Raises
        ------
        AssertionError
            Something does not hold.
        """
        self.read()
        self._tick()
        if not self._closing and self._is_finished():
            self._check_end()
            self._count_errors()
            self.ended += 1
            self.remove()
            self.begin()

    def hurt(self, fault: Fault) -> Undo | None:
        """Apply a fault; returns what ends it, unless it is over already."""
        self.hurt_at = time.monotonic()
        apply: Callable[[Fault], Undo | None] = getattr(self, f"_{fault.kind}")
        return apply(fault)

    def healed(self) -> None:
        """Note the end of a fault."""
        self.hurt_at = time.monotonic()

    def close(self, seconds: float) -> None:
        """Let all programs end in order, and check the files."""
        self._closing = True
        deadline, asked = time.monotonic() + seconds, 0.0
        while running := [program for program in self.programs if program.status() is None]:
            now = time.monotonic()
            assert now < deadline, f"the job does not end within {seconds:.0f} s of SIGUSR1"
            if now - asked > _ASK_AGAIN:  # a program may be about to start again
                asked = now
                for pid in [pid for program in running for pid in program.python_pids()]:
                    send(pid, signal.SIGUSR1)
            time.sleep(0.1)
        self.read()
        self._count_errors()

    def kill(self) -> None:
        """End all programs at once."""
        for program in self.programs:
            program.kill()

    def copy_to(self, folder: Path) -> None:
        """Copy the files of the current run."""
        outputs = self.place.folder.glob(f"{self.name}*.txt")
        for path in [*outputs, self.disk / self.name, self.place.folder / "spare" / self.name]:
            target = folder / path.relative_to(self.place.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, dirs_exist_ok=True)
            elif path.exists():
                shutil.copy(path, target)

    def remove(self) -> None:
        """Remove the files of the current run, for which disks have no room."""
        for folder in (self.disk / self.name, self.place.folder / "spare" / self.name):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    @abstractmethod
    def programs(self) -> Sequence[Program]:
        """The programs of the current run."""

    @abstractmethod
    def progress(self) -> Sequence[float]:
        """For each part of the job that must go on, a number that grows meanwhile; infinity: it has ended."""

    @abstractmethod
    def parts(self) -> int:
        """Number of times that training has begun or continued."""

    @abstractmethod
    def read(self) -> None:
        """Read the files of the job, and check that nothing acknowledged is gone."""

    @abstractmethod
    def _begin(self) -> None: ...

    @abstractmethod
    def _tick(self) -> None: ...

    @abstractmethod
    def _is_finished(self) -> bool: ...

    @abstractmethod
    def _check_end(self) -> None: ...

    def _start_again(self, program: Program) -> None:
        """Start a program that has ended; that it has done so with an error must be the effect of a fault."""
        status, now = program.status(), time.monotonic()
        if status is None or self._closing or now - program.started_at < _AGAIN:
            return
        assert now - self.hurt_at < _AFTERMATH, f"ended by itself, with status {status}"
        program.start()

    def _victims(self) -> list[int]:
        return [pid for program in self.programs for pid in program.pids()]

    def _kill(self, fault: Fault) -> None:
        if (pid := fault.pick(self._victims())) is not None:
            send(pid, signal.SIGKILL)

    def _crash(self, fault: Fault) -> None:
        programs = self.programs
        programs[int(fault.choice * len(programs))].kill()

    def _stop(self, fault: Fault) -> Undo | None:
        pid = fault.pick(self._victims())
        if pid is None or not send(pid, signal.SIGSTOP):
            return None
        return partial(send, pid, signal.SIGCONT)

    def _end(self, fault: Fault) -> None:
        pids = [pid for program in self.programs for pid in program.python_pids()]
        if (pid := fault.pick(pids)) is not None:
            send(pid, signal.SIGTERM if fault.number % 2 else signal.SIGUSR1)

    def _fill(self, fault: Fault) -> Undo:
        file = self.disk / f"filling-{fault.number}"
        for size in (2**20, 2**12, 1):
            with suppress(OSError), file.open("ab", buffering=0) as out:
                while True:
                    out.write(bytes(size))
        return partial(file.unlink, missing_ok=True)

    def _count_errors(self) -> None:
        for program in self.programs:
            self.errors.update(_LAST_LINES.findall(program.text))
