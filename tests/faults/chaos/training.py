"""Training jobs of a trial: started again by `jobs/mpirun.sh`, or continued by the survivors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

from tests.faults.chaos.hand import Fault
from tests.faults.chaos.hosts import LinkedHosts
from tests.faults.chaos.job import Job, Place, Undo
from tests.faults.chaos.journal import Journal
from tests.faults.chaos.program import ROOT, Program
from tests.support.launch import mpiexec

#: Every method, each with the scheme of its compression.
METHODS = (
    "allreduce",
    "allreduce ef+maxnorm:bits=4",
    "local:period=4",
    "lasgd",
    "lasgd ef+maxnorm:bits=4",
    "dsgd",
    "dsgd:overlap=yes",
    "sgp",
    "sgp:overlap=yes",
    "adpsgd:topology=star",
    "adpsgd:topology=star,schedule=drawn",
    "backup",
    "teleport:active=2",
    "ps:mode=sync",
    "ps:mode=async",
    "ps:mode=elastic,interval=2",
)
#: Methods whose ranks take each step together, so that each has a record.
_SYNCHRONOUS = ("allreduce", "local", "dsgd", "sgp")
_EPOCHS, _KEEP = 16, 0.5
#: Slow steps of a small model, so that many jobs share two cores.
SMALL = (
    *("--data", "synthetic:samples=404", "--model", "logistic", "--optimizer", "sgd", "--threads", 1),
    *("--learning-rate", 0.02, "--batch", 8, "--delays", "constant:seconds=0.06", "--log-every", 1),
    *("--timeout", 30, "--progress", "plain"),
)


class TrainingJob(Job):
    """Training by `jobs/mpirun.sh`, which starts again after failures; with ULFM by mpiexec and survivors.

    Parameters
    ----------
    ranks
        Number of ranks.
    shrinks
        Whether the survivors of a dead rank continue.
    hosts
        Hosts of the ranks, whose links can be cut; None: this one.
    """

    kinds = (*Job.kinds, "damage", "intrude")

    def __init__(
        self,
        number: int,
        place: Place,
        methods: Iterator[str],
        ranks: int,
        shrinks: bool,
        hosts: LinkedHosts | None = None,
    ) -> None:
        super().__init__(number, place, methods)
        self._ranks, self._shrinks, self._hosts = ranks, shrinks, hosts
        if hosts is not None:
            self.kinds = (*self.kinds, "cut")
        self._grown = self._parts = 0
        self._intruders: list[Program] = []

    @property
    def programs(self) -> Sequence[Program]:
        return [self._program]

    def kill(self) -> None:
        for program in [self._program, *self._intruders]:
            program.kill()

    def progress(self) -> Sequence[float]:
        return [self._grown + self._journal.growth]

    def parts(self) -> int:
        return self._parts + len(self._journal.parts)

    def read(self) -> None:
        self._journal.read()

    def _begin(self) -> None:
        self._run = self.disk / self.name
        spare = self.place.folder / "spare" / self.name
        method, _, scheme = self.method.partition(" ")
        options = ["--strategy", method, "--compress", scheme or "none", *SMALL, "--epochs", _EPOCHS]
        options += ["--spare", spare, "--keep-every", _KEEP]
        options += ["--on-failure", "shrink" if self._shrinks else "stop"]
        self._words = ["--out", self.disk, "--name", self.name, "--resume", "auto", *options]
        if self._shrinks:
            command = [*mpiexec(), "--with-ft", "ulfm", "-n", self._ranks, "hpcsgd", "train", *self._words]
        else:
            command = ["bash", ROOT / "jobs" / "mpirun.sh", *options]
        variables = {"PATH": self.place.path, "RESTARTS": "3", "RUNS": str(self.disk), "NAME": self.name}
        variables |= self._hosts.variables if self._hosts else {"HOSTS": f"localhost:{self._ranks}"}
        output = self.place.folder / f"{self.name}.txt"
        self._program = Program(command, output, self.place.folder, variables)
        tolerance = 2 * _KEEP / _EPOCHS if self._shrinks else 0.0
        self._journal = Journal(self._run, spare, lambda: self._program.text, tolerance)
        self._program.start()

    def _tick(self) -> None:
        if not self._is_finished():
            self._start_again(self._program)
        for intruder in [each for each in self._intruders if each.status() is not None]:
            self._intruders.remove(intruder)
            self._check_refused(intruder)

    def _is_finished(self) -> bool:
        return self._program.status() == 0 and (self._run / "done").exists()

    def _check_end(self) -> None:
        self._journal.check_end(self.method.split(":")[0] in _SYNCHRONOUS)
        self._grown, self._parts = self._grown + self._journal.growth, self.parts()

    def remove(self) -> None:
        # What has not been refused yet may find no run to be refused by.
        while self._intruders:
            self._intruders.pop().kill()
        super().remove()

    def _cut(self, fault: Fault) -> Undo:
        assert self._hosts is not None
        return self._hosts.cut(fault, self._hosts.ranks)

    def _damage(self, fault: Fault) -> None:
        self._program.kill()
        self._journal.read()
        self._journal.damage_newest()

    def _intrude(self, fault: Fault) -> None:
        """Start a second job in the same folder, of another number of ranks than the checkpoints there."""
        if not self._journal.checkpoints():
            return
        output = self.place.folder / f"{self.name}-intruder-{fault.number}.txt"
        words = [word if word != "shrink" else "stop" for word in self._words]
        variables = {"PATH": self.place.path}
        intruder = Program(["hpcsgd", "train", *words], output, self.place.folder, variables)
        self._intruders.append(intruder)
        intruder.start()

    def _check_refused(self, intruder: Program) -> None:
        refusals = (
            "is in use by another job",
            "was saved by another number of ranks",
            "No space left on device",
        )
        assert intruder.status() != 0 and any(reason in intruder.text for reason in refusals), (
            f"a second job in the same folder ended with status {intruder.status()}:\n{intruder.text}"
        )


def methods(offset: int, in_job_servers: bool) -> Iterator[str]:
    """All methods, beginning with another one for each job."""
    some = [method for method in METHODS if in_job_servers or not method.startswith("ps")]
    rotated = [*some[offset % len(some) :], *some[: offset % len(some)]]
    return cycle(rotated)
