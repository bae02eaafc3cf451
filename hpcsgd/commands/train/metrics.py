"""Measurements of a run: loss and accuracy, time and traffic, and the file of their records."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcsgd.commands.train.console import print_notice
from hpcsgd.commands.train.metrics_file import MetricsFile
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World

FILE = "metrics.jsonl"
#: Fields of records that are times, or shares of times; those of LASGD and of parameter servers are the last.
#: All others are equal in each run of a deterministic method (`Strategy.deterministic`), resumed or not.
TIME_FIELDS = frozenset(
    (
        *("time", "samples_per_second", "compute_seconds", "wait_seconds", "communication_seconds"),
        *("hidden", "queue", "load"),
    )
)


@dataclass
class Sums:
    """Loss and hits summed over targets and divided last, so that sums over ranks are exact."""

    loss: float = 0.0
    hits: int = 0
    targets: int = 0
    samples: int = 0

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    @property
    def mean_loss(self) -> float:
        return self.loss / self.targets if self.targets else float("nan")

    @property
    def accuracy(self) -> float:
        return self.hits / self.targets if self.targets else float("nan")


@dataclass
class Counters:
    """Time, bytes and gradients of one rank since the first step, without evaluations and checkpoints."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    communication_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_shared: int = 0
    bytes_saved: int = 0
    gradients: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class Meter:
    """Reads a rank's clocks and byte counters as totals of the run, across pauses and resumes.

    Bytes of communication that lasts from one step into the next count in the step that uses its result.
    """

    def __init__(self, world: World, before: Counters) -> None:
        self._world = world
        self.gradients = before.gradients  # of this rank; the caller counts them
        now, used = self._now()
        self._offset = now + used - before
        self._pause: Counters | None = None

    def read(self) -> Counters:
        """Return the totals up to now, or up to the begin of the pause."""
        now, used = self._now()
        return (self._pause or now) + used - self._offset

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the enclosed code from the totals."""
        self._pause = before = self._now()[0]
        try:
            yield
        finally:
            self._offset = self._offset + self._now()[0] - before
            self._pause = None

    def _now(self) -> tuple[Counters, Counters]:
        """Return the clocks, and the bytes that count at once; and those that count when a step uses them.

        The latter belong to steps also in a pause: a state that is saved waits for them.
        """
        progress, (moved, used) = self._world.progress, self._world.traffic.of_steps()
        clocks = time.perf_counter(), progress.wait_seconds, progress.busy_seconds
        now = Counters(*clocks, moved.sent, moved.shared, moved.saved, self.gradients)
        return now, Counters(bytes_sent=used.sent, bytes_shared=used.shared, bytes_saved=used.saved)


def counter_fields(counters: Sequence[Counters]) -> dict[str, Any]:
    """Return the fields of a record with the time, bytes and gradients of each rank."""
    moved = sum(c.bytes_sent + c.bytes_shared for c in counters)
    saved = sum(c.bytes_saved for c in counters)
    return {
        "compression_ratio": round((moved + saved) / moved, 4) if moved else 1.0,
        "bytes_sent": [c.bytes_sent for c in counters],
        "bytes_shared": [c.bytes_shared for c in counters],
        "bytes_saved": [c.bytes_saved for c in counters],
        "compute_seconds": [round(c.seconds - c.wait_seconds, 6) for c in counters],
        "wait_seconds": [round(c.wait_seconds, 6) for c in counters],
        "communication_seconds": [round(c.communication_seconds, 6) for c in counters],
        "gradients": [c.gradients for c in counters],
    }


#: In the ``meta`` of a checkpoint: the number of records until then.
RECORDS = "records"


class MetricsWriter:
    """Appends records to a run's `metrics.jsonl`, and to TensorBoard if it is installed.

    Parameters
    ----------
    folder
        The run's folder.
    step
        The step from which the run continues: records of later steps will be written again, and are removed.
    last_record
        The same step in the count of other ranks, if these have written the records.
    restore_folder, must_begin
        As those of `MetricsFile`. Default: the folder is not created again.
    expected
        Number of records until that step; None (default): unknown.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        last_record: int | None = None,
        restore_folder: Callable[[], None] = lambda: None,
        must_begin: bool = True,
        expected: int | None = None,
    ) -> None:
        path = folder / FILE
        last = step if last_record is None else last_record
        retained = [line for line in _lines(path) if _step(path, line) <= last]
        self.count = len(retained)
        if expected is not None and self.count < expected:
            print_notice(
                f"{path} has {self.count} of the {expected} records until step {last}: the others were "
                "removed or damaged, and training continues without them"
            )
        self.file = MetricsFile(path, retained, restore_folder, print_notice, must_begin)
        self._tensorboard = _tensorboard(folder, step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; the file has it on return, unless it cannot be written."""
        self.file.append(json.dumps(record) + "\n")
        self.count += 1
        if self._tensorboard is not None:
            try:
                for name, value in record.items():
                    if name not in ("event", "step") and isinstance(value, int | float):
                        self._tensorboard.add_scalar(f"{record['event']}/{name}", value, record["step"])
            except Exception as error:  # TensorBoard must not fail the run
                print_notice(f"TensorBoard gets no more records of this run: {error}")
                self._tensorboard = None

    def close(self) -> None:
        self.file.close()
        if self._tensorboard is not None:
            with suppress(Exception):
                self._tensorboard.close()


def _lines(path: Path) -> list[str]:
    """Return the complete lines of a file; a killed run may have written half a line."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _step(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise HpcsgdError(
            f"{path} has a line that is not a record with a step",
            got=line.strip()[:80],
            do="remove the line from the file, or start a new run",
        ) from None


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
