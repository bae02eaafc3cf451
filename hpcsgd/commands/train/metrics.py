"""What a run measures of itself, and the file it goes into."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World

FILE = "metrics.jsonl"


@dataclass
class Sums:
    """Loss and hits over some targets, to be divided at the end: exact over any number of ranks."""

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
    """What one rank has spent since the first step of the run, evaluation and checkpoints left out."""

    seconds: float = 0.0
    wait_seconds: float = 0.0
    communication_seconds: float = 0.0
    bytes_sent: int = 0
    bytes_shared: int = 0
    bytes_saved: int = 0
    gradients: int = 0

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class Meter:
    """Reads a rank's clocks and byte counters as totals of the run, over pauses and resumes.

    Parameters
    ----------
    world
        Whose counters to read.
    before
        What earlier parts of the run had spent.

    Attributes
    ----------
    gradients
        How many this rank has computed; whoever computes them counts.
    """

    def __init__(self, world: World, before: Counters) -> None:
        self._world = world
        self.gradients = before.gradients
        self._offset = self._now() - before

    def read(self) -> Counters:
        """The totals up to now."""
        return self._now() - self._offset

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        held = self.read()
        try:
            yield
        finally:
            self._offset = self._now() - held

    def _now(self) -> Counters:
        progress, traffic = self._world.progress, self._world.traffic
        return Counters(
            time.perf_counter(),
            progress.wait_seconds,
            progress.busy_seconds,
            traffic.sent,
            traffic.shared,
            traffic.saved,
            self.gradients,
        )


def spent(counters: Sequence[Counters]) -> dict[str, Any]:
    """The columns of a record that tell what each rank has spent."""
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


class Recorder:
    """Appends records to a run's `metrics.jsonl`, and to TensorBoard where it is installed.

    Parameters
    ----------
    folder
        The run's folder.
    step
        Where the run goes on from; records of later steps, of a part that is repeated, are dropped.
    keep
        Where what it goes on from is another step, because other ranks counted otherwise: that of theirs.
    """

    def __init__(self, folder: Path, step: int, keep: int | None = None) -> None:
        path = folder / FILE
        last = step if keep is None else keep
        kept = [line for line in _lines(path) if _step(path, line) <= last]
        aside = path.with_suffix(".partial")
        aside.write_text("".join(kept))
        os.replace(aside, path)
        self._file = path.open("a", buffering=1)
        self._board = _board(folder, step)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is in the file when this returns."""
        self._file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if name not in ("event", "step") and isinstance(value, int | float):
                    self._board.add_scalar(f"{record['event']}/{name}", value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; a killed run may have left half of one."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("}\n")]


def _step(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise HpcsgdError(
            f"{path} has a line that is no record",
            got=line.strip()[:80],
            do="remove that line, or start a new run",
        ) from None


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
