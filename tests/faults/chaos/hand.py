"""The hand that hurts: a sequence of faults, drawn from a seed and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

#: Kinds of faults, with their weights.
KINDS: Mapping[str, float] = {
    "kill": 5,  # SIGKILL to a process: a rank, a server, a group, or the launcher
    "crash": 1,  # SIGKILL to all processes of a job
    "stop": 5,  # SIGSTOP to a process, and SIGCONT after some seconds
    "end": 2,  # SIGTERM or SIGUSR1 to a rank: a checkpoint, and the end
    "fill": 3,  # the disk of a job is full for some seconds
    "damage": 1,  # all processes are killed, and the newest checkpoint is damaged
    "intrude": 1,  # a second job in the same folder
    "cut": 5,  # a link between hosts is down for some seconds
}
#: Those that end processes, of which the others may still do a last step.
ENDING = ("kill", "crash", "end", "damage")
_AT_ONCE = 0.25  # probability that a fault comes together with the one before
_LONGEST = 4.0  # seconds that a fault lasts


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes
    ----------
    number
        Its number in the sequence, from 0.
    at
        Seconds since the start of the trial.
    kind
        One of `KINDS`.
    job
        Number of the job that it hits.
    choice
        Which of the processes that the job has at that time, as a fraction.
    seconds
        How long it lasts.
    """

    number: int
    at: float
    kind: str
    job: int
    choice: float
    seconds: float

    def pick(self, some: Sequence[int]) -> int | None:
        """Pick one of several processes."""
        return some[int(self.choice * len(some))] if some else None

    def __str__(self) -> str:
        return (
            f"fault {self.number} at {self.at:.1f} s: {self.kind} ({self.choice:.3f}, {self.seconds:.1f} s)"
        )


class Hand:
    """Draws faults.

    Parameters
    ----------
    seed
        The seed, which with the other arguments determines all of the sequence.
    jobs
        The kinds of faults that each job can have.
    every
        Mean seconds between two faults.
    """

    def __init__(self, seed: int, jobs: Sequence[Sequence[str]], every: float) -> None:
        self._seed, self._jobs, self._every = seed, jobs, every

    def faults(self) -> Iterator[Fault]:
        """Generate the faults, in order of time, without end."""
        rng = random.Random(self._seed)
        at, number = 0.0, 0
        while True:
            gap = rng.uniform(0.5, 1.5) * self._every / (1 - _AT_ONCE)
            at += gap if rng.random() > _AT_ONCE else 0.0
            job = rng.randrange(len(self._jobs))
            kinds = self._jobs[job]
            kind = rng.choices(kinds, [KINDS[kind] for kind in kinds])[0]
            yield Fault(number, at, kind, job, rng.random(), rng.uniform(0.5, _LONGEST))
            number += 1
