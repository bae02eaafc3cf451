"""Runs the checks on all ranks, with a deadline each, and prints the page on the first rank."""

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
from hpcsgd.commands.doctor.check import Check, Facts, Finding, name_ranks, ranks_by_value
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.mpi import launcher, shutdown

TIMEOUT = 30.0  # seconds that rank 0 waits for the facts of all ranks; its own check may take twice as long
_FAILED = "failed"


class DoctorReport:
    """The results so far, on rank 0; they can be printed as a page at any time."""

    def __init__(self, job: ExaminedJob) -> None:
        self._job = job
        self.ranks: list[Facts] = [{} for _ in range(job.size)]  # the facts of each
        self.checked: dict[str, list[str]] = {}  # the lines of each check that has ended
        self.findings: list[Finding] = []
        self._started = time.monotonic()

    def add(self, check: Check, found: dict[int, Facts]) -> bool:
        """Add the facts, lines and findings of a check, or its failure; False if a rank is missing."""
        for rank, facts in found.items():
            self.ranks[rank].update(facts)
        failures = ranks_by_value(self.ranks, lambda facts: facts.pop(_FAILED, ""))
        failed = [f"{text} ({name_ranks(members, self.ranks)})" for text, members in failures.items() if text]
        missing = [rank for rank in range(len(self.ranks)) if rank not in found]
        if missing:
            silent = name_ranks(missing, self.ranks)
            self.mark_unfinished(check, f"no reply from {silent} within {self._job.timeout:g} s")
            return False
        try:
            if not failed:
                lines, findings = list(check.describe(self.ranks)), list(check.diagnose(self.ranks))
        except Exception as error:
            failed = [_error_text(error)]
        if failed:
            lines = [f"failed: {line}" for line in failed]
            findings = [
                Finding(
                    "warning",
                    f"{check.name} could not be checked: {failed[0]}",
                    "fix the cause and run the doctor again",
                )
            ]
        self.checked[check.name] = lines
        self.findings += findings
        return True

    def mark_unfinished(self, check: Check, reason: str) -> None:
        """Add the finding that a check did not end."""
        self.checked[check.name] = [f"not finished: {reason}"]
        self.findings.append(
            Finding(
                "error",
                f"the check of {check.name} did not end: {reason}; the checks after it were not run",
                "inspect that rank: its node, its network, and the file system of --out",
            )
        )

    def print_page(self) -> int:
        """Print the page; returns the exit status: 1 if it has an error, else 0."""
        seconds = time.monotonic() - self._started
        count = len(self.ranks)
        title = f"hpcsgd doctor: {count} rank{'s' * (count > 1)}, {seconds:.1f} s"
        # Open MPI gives the first rank of a job a terminal, even if the output goes to a file.
        color = False if launcher.sizes() else None
        for line in layout.lines(title, self.checked, self.findings):
            click.echo(line, color=color)
        sys.stdout.flush()
        return int(any(finding.level == "error" for finding in self.findings))


def run_checks(checks: Sequence[Check], out: Path, timeout: float = TIMEOUT) -> int:
    """Run the checks and print the page; returns the exit status of this rank."""
    job = ExaminedJob(out, timeout)
    if job.size == 1 and not job.is_reporting_rank:
        return 0
    report = DoctorReport(job)
    for check in checks:
        with _time_limit(job, report, check):
            facts = _collect(check, job)
            found = job.gather_facts(facts)
        if job.rank == 0 and not report.add(check, found):
            _abort(job, report)
    if not job.is_reporting_rank:
        # An exit status of 1 could end the job before the first rank has printed the page.
        return 0
    return report.print_page()


def _collect(check: Check, job: ExaminedJob) -> Facts:
    try:
        job.renew_communicator()
        return check.collect(job)
    except Exception as error:
        return {_FAILED: _error_text(error)}


@contextmanager
def _time_limit(job: ExaminedJob, report: DoctorReport, check: Check) -> Iterator[None]:
    """Context that prints the page and ends the job if rank 0 hangs in native code."""
    limit = 2 * job.timeout

    def on_timeout() -> None:
        report.mark_unfinished(check, f"rank 0 has not returned from it for {limit:g} s")
        _abort(job, report)

    timer = threading.Timer(limit, on_timeout)
    timer.daemon = True
    if job.is_reporting_rank:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _abort(job: ExaminedJob, report: DoctorReport) -> None:
    report.print_page()
    if job.size > 1:
        shutdown.abort_job()
    os._exit(1)


def _error_text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
