"""What a run has acknowledged, its records and its checkpoints, and the check that none of it is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

#: The line with which a run begins, or continues.
_HEADLINE = re.compile(r"over (\d+) ranks .*?; (\d+) steps(?:, from step (\d+))?; ")


@dataclass(frozen=True)
class Part:
    """A part of a run, by one set of ranks.

    Attributes
    ----------
    ranks
        Number of ranks.
    total
        Steps of the whole run, in the count of these ranks.
    start
        The step from which they continue.
    """

    ranks: int
    total: int
    start: int

    @property
    def place(self) -> float:
        """The start, as a fraction of the run."""
        return self.start / self.total


class Journal:
    """Follows the files of a run from outside.

    Parameters
    ----------
    run
        The run's folder.
    spare
        The folder in which its spare folder would be.
    text
        Returns the output of the run so far.
    tolerance
        Fraction of the run by which it may go back behind its last checkpoint, for survivors of a failure
        continue from copies in memory.

    Attributes
    ----------
    growth
        Number of records seen so far; it grows also where a run repeats steps.
    parts
        The parts of the run so far.
    taken
        Number of steps of all parts before the last one, as far as they have records.
    """

    def __init__(self, run: Path, spare: Path, text: Callable[[], str], tolerance: float = 0.0) -> None:
        self._run, self._spare, self._text, self._tolerance = run, spare, text, tolerance
        self.growth = self.taken = 0
        self.parts: list[Part] = []
        self._lines: list[bytes] = []
        self._of_lines = 0  # parts when these lines were read
        self._saved = 0.0  # the place of the newest checkpoint of the current part, or of its start
        self._earlier: set[tuple[str, int]] = set()  # checkpoints that this part has not written
        self._seen: set[tuple[str, int]] = set()
        self._stat: tuple[int, int] | None = None

    def read(self) -> None:
        """Read all files.

        Raises
        ------
        AssertionError
            Something acknowledged is gone.
        """
        # In this order: a part prints its line after it has removed records, and before it saves.
        parts = self._read_parts()
        self._check_starts(parts[len(self.parts) :])
        self.parts = parts
        self._check_records()
        self._seen = {_identity(path) for path in self.checkpoints().values()}
        if parts:
            written = (
                step for step, path in self.checkpoints().items() if _identity(path) not in self._earlier
            )
            self._saved = max([self._saved, *(step / parts[-1].total for step in written)])

    def checkpoints(self) -> dict[int, Path]:
        """The whole checkpoints of the run, by step."""
        found = [*self._run.glob("checkpoints/step-*/manifest.json")]
        found += self._spare.glob("*/checkpoints/step-*/manifest.json")
        return {int(path.parent.name.removeprefix("step-")): path.parent for path in sorted(found)}

    def damage_newest(self) -> None:
        """Change a byte of the newest checkpoint, of a run that is not running, if there is an older one."""
        saved = self.checkpoints()
        if len(saved) < 2 or not self.parts:
            return
        *_, older, newest = sorted(saved)
        file = max(saved[newest].glob("rank-*.pt"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        self._saved = older / self.parts[-1].total
        self._earlier.add(_identity(saved[newest]))

    @property
    def last_step(self) -> int:
        """The step of the last record."""
        return int(json.loads(self._lines[-1])["step"]) if self._lines else 0

    def records(self) -> list[dict[str, Any]]:
        """The records of the run."""
        return [json.loads(line) for line in self._lines]

    def check_end(self, synchronous: bool) -> None:
        """Check the files of a run that has reached its end.

        Parameters
        ----------
        synchronous
            Whether each step has a record, if the number of ranks was always the same.
        """
        self.read()
        records = self.records()
        steps = [record["step"] for record in records if record["event"] == "train"]
        losses = [record["loss"] for record in records if record["event"] == "test"]
        assert len(losses) > 2 and losses[-1] < losses[0], f"the loss does not fall: {losses}"
        assert records[-1]["step"] == self.parts[-1].total, (
            f"the last record is of step {records[-1]['step']}"
        )
        if synchronous and len({part.ranks for part in self.parts}) == 1:
            assert steps == list(range(1, len(steps) + 1)), f"steps without a record: {_gaps(steps)}"
        left = [path.name for path in self._run.iterdir() if path.name.startswith(".") or path.name == "lock"]
        assert not left, f"files left in the run's folder: {left}"
        assert max(self.checkpoints(), default=0) == self.parts[-1].total, "there is no checkpoint of the end"

    def _read_parts(self) -> list[Part]:
        return [
            Part(int(ranks), int(total), int(start or 0))
            for ranks, total, start in _HEADLINE.findall(self._text())
        ]

    def _check_starts(self, parts: list[Part]) -> None:
        if parts and self.parts:
            self.taken += max(0, self.last_step - self.parts[-1].start)
        for part in parts:
            back = self._saved - part.place
            assert back <= self._tolerance + 1 / part.total * bool(self._tolerance), (
                f"a checkpoint is lost: the run continues from step {part.start} of {part.total}, "
                f"and had one of step {self._saved * part.total:.1f}"
            )
            self._saved, self._earlier = part.place, self._seen

    def _check_records(self) -> None:
        path = self._run / "metrics.jsonl"
        if not path.exists():
            return
        stat = path.stat()
        if (stat.st_ino, stat.st_size) == self._stat:
            return
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        common = _count_equal(lines, self._lines)
        if common < len(self._lines):
            parts = self.parts[self._of_lines :]
            if not parts:
                return  # its line is still to come
            self._check_removed(self._lines[common:], parts)
        self.growth += len(lines) - common
        self._lines, self._of_lines, self._stat = lines, len(self.parts), (stat.st_ino, stat.st_size)
        for one, other in pairwise(map(json.loads, lines[max(0, common - 1) :])):
            assert one["epoch"] <= other["epoch"], f"records out of order: {one}, then {other}"

    def _check_removed(self, lines: list[bytes], parts: list[Part]) -> None:
        for record in map(json.loads, lines):
            ranks, step = len(record["bytes_sent"]), record["step"]
            for part in parts:
                # In another count of steps the place is known to within a step.
                kept = step <= part.start if part.ranks == ranks else False
                assert not kept or any(step > other.start for other in parts), (
                    f"the record of step {step} is lost: the run has continued from step {part.start}"
                )


def _identity(checkpoint: Path) -> tuple[str, int]:
    """Step and time of a checkpoint, which it keeps when it is brought home from the spare folder."""
    try:
        return checkpoint.name, (checkpoint / "manifest.json").stat().st_mtime_ns
    except FileNotFoundError:
        return checkpoint.name, 0


def _count_equal(one: list[bytes], other: list[bytes]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _gaps(steps: list[int]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in pairwise([0, *steps]) if b != a + 1]
