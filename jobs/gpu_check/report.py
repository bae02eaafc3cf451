"""The report of `jobs/gpu_check.sh`: goals, a JSON file and a page of text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.gpu_check.machine import Outcome
from jobs.gpu_check.steps import SCHEME

BANDWIDTH, COST = 0.85, 1.03
_LINES = 40  # of a part of the page
_STATUSES = ("passed", "failed", "timed out", "skipped")


@dataclass
class Goal:
    """A goal, the figure it is about, and a verdict: reached, missed, not measured or not judged."""

    name: str
    bound: float
    measured: float | None
    verdict: str


def goals(outcomes: Sequence[Outcome], dry_run: bool) -> list[Goal]:
    """The goals of the check, beside the figures that were measured so far."""
    rows = {outcome.name: outcome.figures for outcome in outcomes}
    kernels = {row["method"]: row for row in rows.get("bench compress", []) if row["phase"] == "kernel"}
    means = [row for row in rows.get("bench allreduce, 2 ranks", []) if row["method"] == "hpcsgd"]
    trained = rows.get("bench step, 2 ranks", [])

    def rate(name: str) -> float:
        return float(kernels[name]["bytes"]) / float(kernels[name]["median_ms"])

    found: list[tuple[str, float, float | None]] = []
    for name in ("encode", "decode"):
        share = rate(name) / rate("memory copy") if name in kernels else None
        found.append((f"{name}, share of the copy's bandwidth", BANDWIDTH, share))
    largest = max(means, key=lambda row: int(row["bytes"]), default=None)
    share = float(largest["share_of_limit"]) if largest and "share_of_limit" in largest else None
    size = f" of {int(largest['bytes']) / 2**20:g} MiB" if largest else ""
    found.append((f"all-reduce{size}, 2 ranks, share of the copy's bandwidth", BANDWIDTH, share))
    costs = [row for row in trained if row["contender"].startswith("hpcsgd, ")]
    for row in costs or [{"model": "all models"}]:
        cost = float(row["times_no_communication"]) if costs else None
        found.append((f"step of {row['model']}, {SCHEME}, multiple of no communication", COST, cost))
    return [Goal(*each, _verdict(*each[1:], dry_run)) for each in found]


def _verdict(bound: float, measured: float | None, dry_run: bool) -> str:
    if measured is None:
        return "not measured"
    if dry_run:
        return "not judged: a dry run"
    return "reached" if (measured >= bound if bound < 1 else measured <= bound) else "missed"


class Report:
    """The JSON file and the page of text, rewritten after every step.

    Parameters
    ----------
    folder
        Where they are written.
    dry_run
        Whether sizes are tiny and no GPU is used.

    Attributes
    ----------
    outcomes
        Those of the steps so far.
    """

    def __init__(self, folder: Path, dry_run: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dry_run = folder, dry_run
        self.outcomes: list[Outcome] = []
        self._facts: dict[str, Any] = {}
        self._began = time.monotonic()

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of a step, and write both files."""
        self.outcomes.append(outcome)
        if outcome.name == "device":
            lines = [line for line in outcome.output.splitlines() if line.startswith("{")]
            with suppress(ValueError, IndexError):
                self._facts = json.loads(lines[-1])
        self.write()

    def write(self) -> None:
        """Write both files, of the steps so far."""
        content = {
            "dry_run": self.dry_run,
            "machine": self._facts,
            "seconds": round(time.monotonic() - self._began, 1),
            "goals": [asdict(goal) for goal in goals(self.outcomes, self.dry_run)],
            "steps": [asdict(each) for each in self.outcomes],
        }
        self._write("gpu_check.json", json.dumps(content, indent=1) + "\n")
        self._write("gpu_check.txt", self.page())

    def page(self) -> str:
        """The page of text: verdicts first, then the steps, the tests that failed, and the figures."""
        kind = "dry run on a CPU" if self.dry_run else "GPU check"
        counts = ", ".join(f"{sum(o.status == s for o in self.outcomes)} {s}" for s in _STATUSES)
        lines = [f"{kind} after {time.monotonic() - self._began:.0f} s: {counts}"]
        lines += ["; ".join(f"{name} {value}" for name, value in self._facts.items()) or "device unknown", ""]
        for goal in goals(self.outcomes, self.dry_run):
            measured = "" if goal.measured is None else f"{goal.measured:.3f} "
            lines.append(f"{goal.verdict:>12}  {goal.name}: {measured}(goal {goal.bound})")
        lines.append("")
        for o in self.outcomes:
            tests = ", ".join(f"{n} {name}" for name, n in o.tests.items())
            notes = "; ".join(filter(None, (o.reason, tests)))
            lines.append(f"{o.status:>12}  {o.seconds:6.1f} s  {o.name}{f': {notes}' * bool(notes)}")
        failed = [f"{o.name}: {line}"[:160] for o in self.outcomes for line in o.failed_tests]
        for title, found in (("failed tests", failed), ("figures, in ms", list(self._figures()))):
            hidden = len(found) - _LINES
            lines += ["", title, *found[:_LINES]] if found else []
            lines += [f"and {hidden} more, see gpu_check.json"] if hidden > 0 else []
        return "\n".join(lines) + "\n"

    def _figures(self) -> Iterator[str]:
        """A line per size, model or kernel of each benchmark, with the medians of the methods."""
        for outcome in self.outcomes:
            groups: dict[str, list[str]] = {}
            for row in outcome.figures:
                if row.get("phase", "kernel") == "kernel":
                    key = row.get("model") or (row.get("bytes", "") if "phase" not in row else "kernels")
                    name = row.get("contender") or row.get("method", "")
                    ratio = row.get("times_no_communication") or row.get("share_of_limit") or ""
                    share = f" ({float(ratio):.2f})" if ratio else ""
                    groups.setdefault(key, []).append(f"{name} {float(row['median_ms']):.4g}{share}")
            for key, cells in groups.items():
                yield f"{outcome.name}, {key}: {', '.join(cells)}"

    def _write(self, name: str, text: str) -> None:
        # Never half a file: the machine may go away while it is written.
        part = self.folder / f".{name}"
        part.write_text(text)
        part.replace(self.folder / name)
