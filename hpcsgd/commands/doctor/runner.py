"""Goes through the checks on all ranks, and lets the first print the page."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from hpcsgd.commands.doctor import layout
from hpcsgd.commands.doctor.check import Check, Facts, Finding, group, name_of
from hpcsgd.commands.doctor.ranks import Job
from hpcsgd.mpi import launcher, shutdown

PATIENCE = 30.0  # seconds that rank 0 waits for the facts of all ranks; its own may take twice as long
_FAILED = "failed"


class Examination:
    """What rank 0 knows so far, which is a page at any time.

    Parameters
    ----------
    job
        The ranks.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.ranks: list[Facts] = [{} for _ in range(job.size)]
        self.checked: dict[str, list[str]] = {}
        self.findings: list[Finding] = []
        self._started = time.monotonic()

    def add(self, check: Check, found: dict[int, Facts]) -> bool:
        """Take what the ranks found: lines and mistakes, or what failed; False where a rank is missing."""
        for rank, facts in found.items():
            self.ranks[rank].update(facts)
        failures = group(self.ranks, lambda facts: facts.pop(_FAILED, ""))
        failed = [f"{text} ({name_of(who, self.ranks)})" for text, who in failures.items() if text]
        missing = [rank for rank in range(len(self.ranks)) if rank not in found]
        if missing:
            self.stuck(check, f"no word from {name_of(missing, self.ranks)} within {self._job.patience:g} s")
            return False
        try:
            if not failed:
                lines, findings = list(check.show(self.ranks)), list(check.judge(self.ranks))
        except Exception as error:
            failed = [_word(error)]
        if failed:
            lines = [f"failed: {line}" for line in failed]
            findings = [
                Finding(
                    "warning", f"{check.name} could not be checked: {failed[0]}", "mend that, and look again"
                )
            ]
        self.checked[check.name] = lines
        self.findings += findings
        return True

    def stuck(self, check: Check, what: str) -> None:
        """Note that a check did not end."""
        self.checked[check.name] = [f"not over: {what}"]
        self.findings.append(
            Finding(
                "error",
                f"the check of {check.name} did not end: {what}; those after it were not made",
                "look at what that process waits for there: its node, the network, the file system",
            )
        )

    def show(self) -> int:
        """Print the page; 1 with an error on it, else 0."""
        seconds = time.monotonic() - self._started
        count = len(self.ranks)
        title = f"hpcsgd doctor: {count} rank{'s' * (count > 1)}, {seconds:.1f} s"
        # Open MPI gives a job's first rank a terminal, whatever it writes to itself.
        color = False if launcher.sizes() else None
        for line in layout.lines(title, self.checked, self.findings):
            click.echo(line, color=color)
        sys.stdout.flush()
        return int(any(finding.level == "error" for finding in self.findings))


def examine(checks: Sequence[Check], out: Path, patience: float = PATIENCE) -> int:
    """Go through `checks`; the exit status of this rank.

    Parameters
    ----------
    checks
        In order.
    out
        The folder that runs go to.
    patience
        Seconds until a rank that is silent ends the examination. Default 30.
    """
    job = Job(out, patience)
    if job.size == 1 and not job.speaks:
        return 0
    so_far = Examination(job)
    for check in checks:
        with _limited(job, so_far, check):
            facts = _facts(check, job)
            found = job.report(facts)
        if job.rank == 0 and not so_far.add(check, found):
            _give_up(job, so_far)
    if not job.speaks:
        # A status of 1 might end the process that prints before it has.
        return 0
    return so_far.show()


def _facts(check: Check, job: Job) -> Facts:
    try:
        job.next_check()
        return check.gather(job)
    except Exception as error:
        return {_FAILED: _word(error)}


@contextmanager
def _limited(job: Job, so_far: Examination, check: Check) -> Iterator[None]:
    """End the job, with the page as it is, where rank 0 hangs in native code."""

    longest = 2 * job.patience

    def late() -> None:
        so_far.stuck(check, f"rank 0 is in it for {longest:g} s")
        _give_up(job, so_far)

    timer = threading.Timer(longest, late)
    timer.daemon = True
    if job.speaks:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(job: Job, so_far: Examination) -> None:
    so_far.show()
    if job.size > 1:
        shutdown.abort()
    os._exit(1)


def _word(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
