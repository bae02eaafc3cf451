"""A trial: many jobs at once, one hand, and the check after each fault."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf
from pathlib import Path

from tests.faults.chaos import servers, training
from tests.faults.chaos.hand import ENDING, Fault, Hand
from tests.faults.chaos.hosts import LinkedHosts
from tests.faults.chaos.job import Job, Place
from tests.faults.chaos.program import write_hpcsgd
from tests.faults.chaos.servers import ServerJob
from tests.faults.chaos.table import Case, Result
from tests.faults.chaos.training import TrainingJob
from tests.lab import hosts
from tests.support import disks
from tests.support.launch import is_open_mpi

_POLL = 0.2  # seconds
_LAST_STEPS = 2.0  # seconds in which the rest of a job may still write after one of its processes has ended
_TAIL, _LAST_FAULTS = 4000, 8  # characters of output, and faults, in the report of a failure


@dataclass(frozen=True)
class Options:
    """Options of a trial.

    Attributes
    ----------
    seed
        Seed of the hand.
    seconds, faults
        The trial ends when either is reached.
    every
        Mean seconds between two faults.
    jobs
        Number of training jobs on this host; servers, and hosts with links, come in addition.
    patience
        Seconds after the end of a fault in which its job must go on.
    """

    seed: int
    seconds: float = 60.0
    faults: int = 10**9
    every: float = 2.5
    jobs: int = 5
    patience: float = 150.0

    def command(self) -> str:
        """Return the command that repeats the trial."""
        return (
            f"{sys.executable} -m tests.faults.chaos --seed {self.seed} --seconds {self.seconds:g} "
            f"--faults {self.faults} --every {self.every:g} --jobs {self.jobs} --patience {self.patience:g}"
        )


@dataclass
class Pending:
    """A fault whose job has not yet gone on."""

    fault: Fault
    job: Job
    case: Case
    ended: int  # runs of the job before the fault
    parts: int  # and their parts
    over_at: float | None = None  # the end of the fault
    progress: Sequence[float] | None = None  # of the job after that

    def heal(self, now: float) -> None:
        """Note the end of the fault."""
        self.over_at = now
        self.job.healed()
        if self.fault.kind not in ENDING:
            self.progress = self.job.progress()

    def has_gone_on(self, now: float) -> bool:
        """Return whether all parts of the job have gone on since the end of the fault."""
        if self.over_at is None:
            return False
        if self.job.ended > self.ended:
            return True
        progress = self.job.progress()
        if self.progress is None:
            if self.job.parts() > self.parts or now - self.over_at > _LAST_STEPS:
                self.progress = progress
            return False
        return all(b > a or b == inf for a, b in zip(self.progress, progress, strict=True))


class Trial:
    """Runs jobs, applies faults, and notes what does not hold.

    Parameters
    ----------
    options
        Its options.
    report
        Called with a line for each fault and each failure.
    keep
        Folder to which the files of runs that have failed are copied; None (default): they are removed.
    """

    def __init__(self, options: Options, report: Callable[[str], None], keep: Path | None = None) -> None:
        self._options, self._report, self._keep = options, report, keep
        self._closing = False
        self.result = Result(options.seed)
        self._pending: list[Pending] = []
        self._undo: list[tuple[float, int, Pending, Callable[[], object]]] = []
        self._history: dict[int, list[str]] = {}

    def run(self) -> Result:
        """Run the trial to its end."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            self._jobs = list(self._make_jobs(folder, stack))
            stack.callback(self._kill)
            self._began = time.monotonic()
            for job in self._jobs:
                job.begin()
            self._hurt()
            self._settle()
            self.result.seconds, self._closing = self._now(), True
            for job in self._jobs:
                self._guarded(job, lambda job=job: job.close(self._options.patience))
                self.result.errors += job.errors
        return self.result

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _make_jobs(self, folder: Path, stack: ExitStack) -> Iterator[Job]:
        options, count = self._options, self._options.jobs + 2
        mounts = not disks.obstacle()
        # That of the servers has room for their log of updates, which allocates 64 MiB at once.
        sizes = {number: "256m" if number == options.jobs else "3m" for number in range(count * mounts)}
        small = {
            number: stack.enter_context(disks.small_disk(folder / f"disk-{number}", size))
            for number, size in sizes.items()
        }
        path = os.pathsep.join(
            [str(write_hpcsgd(folder)), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
        )
        place = Place(folder, small, path)
        shrinks = is_open_mpi()
        linked = None
        if not hosts.obstacle() and not shrinks:
            linked = stack.enter_context(LinkedHosts(4))
        for number in range(options.jobs):
            methods = training.methods(number * 3, in_job_servers=not shrinks)
            yield TrainingJob(number, place, methods, 4 if shrinks else 3, shrinks)
        yield ServerJob(options.jobs, place, servers.methods(), linked)
        if linked:
            methods = training.methods(5, in_job_servers=True)
            yield TrainingJob(options.jobs + 1, place, methods, 2, False, linked)

    def _hurt(self) -> None:
        """Apply the faults of the hand, in time."""
        hand = Hand(self._options.seed, [job.kinds for job in self._jobs], self._options.every)
        for fault in hand.faults():
            if fault.at > self._options.seconds or fault.number >= self._options.faults:
                return
            while self._now() < fault.at:
                self._tick()
            self._apply(fault)

    def _apply(self, fault: Fault) -> None:
        job = self._jobs[fault.job]
        line = f"{fault} of job {job.name}, {job.method}"
        self._report(line)
        self._history.setdefault(job.number, []).append(line)
        case = Case(fault.kind, job.method)
        self.result.cases.append(case)
        pending = Pending(fault, job, case, job.ended, job.parts())
        self._pending.append(pending)
        undo = job.hurt(fault)
        if undo is None:
            self._heal(pending)
        else:
            heappush(self._undo, (self._now() + fault.seconds, fault.number, pending, undo))

    def _tick(self) -> None:
        """End the faults that are due, look at all jobs, and sleep a little."""
        while self._undo and self._undo[0][0] <= self._now():
            _, _, pending, undo = heappop(self._undo)
            undo()
            self._heal(pending)
        for job in self._jobs:
            self._guarded(job, job.tick)
        for pending in [*self._pending]:
            self._look_at(pending)
        time.sleep(_POLL)

    def _heal(self, pending: Pending) -> None:
        self._guarded(pending.job, pending.job.read)
        if pending in self._pending:
            pending.heal(self._now())

    def _look_at(self, pending: Pending) -> None:
        now, over_at = self._now(), pending.over_at
        if over_at is None:
            return
        if pending.has_gone_on(now):
            pending.case.seconds = now - over_at
            self._pending.remove(pending)
        elif time.monotonic() - pending.job.hurt_at > self._options.patience:
            patience = f"{self._options.patience:g} s after its last fault"
            self._fail(pending.job, f"the job has not gone on {patience}, since {pending.fault}")

    def _settle(self) -> None:
        """Wait until all jobs have recovered."""
        while self._pending:
            self._tick()

    def _guarded(self, job: Job, action: Callable[[], None]) -> None:
        before, method = job.ended, job.method
        try:
            action()
        except AssertionError as error:
            self._fail(job, str(error))
        if job.ended > before:
            self.result.runs[method] += 1

    def _fail(self, job: Job, reason: str) -> None:
        """Note a failure, and let the job begin anew."""
        outputs = "\n".join(f"--- {text[-_TAIL:]}" for text in (program.text for program in job.programs))
        faults = "\n".join(self._history.get(job.number, [])[-_LAST_FAULTS:])
        failure = (
            f"job {job.name}, {job.method}: {reason}\nits last faults:\n{faults}\n"
            f"to repeat it: {self._options.command()}\n{outputs}"
        )
        self._report(failure)
        self.result.failures.append(failure)
        for pending in [pending for pending in self._pending if pending.job is job]:
            self._pending.remove(pending)
        job.kill()
        if self._keep is not None:
            job.copy_to(self._keep)
        job.remove()
        if not self._closing:
            job.begin()

    def _kill(self) -> None:
        while self._undo:
            heappop(self._undo)[3]()
        for job in self._jobs:
            job.kill()
