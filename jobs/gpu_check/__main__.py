"""The command of `jobs/gpu_check.sh`.

Needs only Python's own library, so that a missing or broken package fails one step, and not the report.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from jobs.gpu_check.machine import Machine, Outcome, run_step
from jobs.gpu_check.report import Report
from jobs.gpu_check.steps import Step, steps

BUDGET = 480.0
#: Seconds without which a step is not begun.
SHORTEST = 10.0


def check(planned: Sequence[Step], machine: Machine, report: Report, budget: float) -> int:
    """Run the steps within a budget of seconds; returns 1 if one failed, after all have run."""
    log, end = report.folder / "gpu_check.log", time.monotonic() + budget
    log.write_text("")
    report.write()
    if machine.problem:
        report.add(Outcome("wheels", "failed", machine.problem))
    for step in planned:
        left = end - time.monotonic()
        if left < SHORTEST:
            outcome = Outcome(step.name, "skipped", f"{max(left, 0):.0f} s left of {budget:.0f}")
        else:
            outcome = run_step(step, machine, log, min(step.seconds, left))
        report.add(outcome)
        _print(f"{outcome.status}: {outcome.name}, {outcome.seconds} s {outcome.reason}")
    _print(f"\n{report.page()}\n{report.folder}/gpu_check.json")
    states = [outcome.status for outcome in report.outcomes]
    return int("passed" not in states or any(outcome.is_failure for outcome in report.outcomes))


def _print(text: str) -> None:
    # Whoever reads this may go away, as over a connection that breaks: the steps and the report go on.
    with suppress(BrokenPipeError):
        print(text, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line, and run the check."""
    parser = argparse.ArgumentParser(
        prog="jobs/gpu_check.sh", description="Check and measure hpcsgd on a GPU."
    )
    parser.add_argument("--dry-run", action="store_true", help="every step with tiny sizes, on a CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu-check"), help="folder of the report")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels to install for the check, into a temporary one"
    )
    parser.add_argument(
        "--only", default="", help="parts of names of steps, comma-separated; default: all steps"
    )
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds for all steps (default: %(default)s)"
    )
    options = parser.parse_args(words)
    chosen = [part.strip() for part in options.only.split(",") if part.strip()] or [""]
    planned = [step for step in steps(options.dry_run) if any(part in step.name for part in chosen)]
    if not planned:
        names = ", ".join(step.name for step in steps(options.dry_run))
        parser.error(f"--only {options.only}: no such step; there are: {names}")
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that no step outlives this
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        machine = Machine(Path(work), options.wheels)
        try:
            report = Report(options.output.resolve(), options.dry_run)
        except OSError as error:
            parser.error(f"--output {options.output}: {error}")
        return check(planned, machine, report, options.budget - (time.monotonic() - began))


if __name__ == "__main__":
    sys.exit(main())
