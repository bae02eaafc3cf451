"""The numbers of the summary table, and their text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hpcsgd.commands.report.labels import labels, task
from hpcsgd.commands.report.records import Columns, Integers, RunRecord
from hpcsgd.commands.report.units import byte_unit, significant, time_unit

_UNKNOWN = "—"
# Accuracies are ratios of counts: one that equals a half point may be rounded below it.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Summary:
    """The summary of one run; None marks a value that its records do not contain."""

    label: str  # label of the run in this comparison
    #: Test accuracy from 0 to 1 at the last evaluation, and the highest.
    final_accuracy: float | None
    best_accuracy: float | None
    final_loss: float | None  # test loss at the last evaluation
    time: float  # seconds from the first step to the last record
    #: Seconds from the first step to the first evaluation that reaches the common target.
    time_to_target: float | None
    #: Bytes sent per rank in messages, mean over ranks; includes bytes moved through shared memory if a run
    #: on one node moves more through it than in messages.
    bytes_per_rank: float
    shared: bool  # whether `bytes_per_rank` includes shared memory
    compression: float | None  # bytes without compression over bytes moved; None if nothing was compressed
    waiting: float | None  # wait time as a share of compute plus wait time, over all ranks
    #: The rank with the longest compute time, and the ratio of that time to the median of the ranks.
    slowest_rank: int | None
    slowdown: float | None


def summaries(runs: Sequence[RunRecord]) -> list[Summary]:
    """Summarise each run, with the target accuracy common to all of them."""
    target = common_target(runs)
    return [_summary(run, label, target) for run, label in zip(runs, labels(runs), strict=True)]


def common_target(runs: Sequence[RunRecord]) -> float | None:
    """The highest accuracy, in steps of half a point, that every run reaches.

    None if a run has none, or the runs are of several tasks.
    """
    if len({task(run) for run in runs}) > 1:
        return None
    best = [_best(run) for run in runs]
    reached = [accuracy for accuracy in best if accuracy is not None]
    if len(reached) < len(runs):
        return None
    return math.floor(min(reached) * 200 + _ROUNDING) / 200


def uses_mostly_shared_memory(run: RunRecord) -> bool:
    """Whether the run sends nothing, or, on a single node, less than it moves through shared memory."""
    sent, shared = run.last.bytes_sent[-1].sum(), run.last.bytes_shared[-1].sum()
    one_node = run.config.get("world", {}).get("nodes") == 1
    return bool(sent == 0 or (one_node and shared > sent))


def moved_bytes(run: RunRecord, columns: Columns) -> Integers:
    """Bytes that each rank sent, plus those in shared memory if that is used mostly; (records, ranks)."""
    return columns.bytes_sent + (columns.bytes_shared if uses_mostly_shared_memory(run) else 0)


def cells(runs: Sequence[RunRecord]) -> tuple[list[str], list[list[str]]]:
    """The summary table as text: the header with units, and a row per run."""
    rows, target = summaries(runs), common_target(runs)
    time = time_unit(max(row.time for row in rows))
    size = byte_unit(max(row.bytes_per_rank for row in rows))
    goal = "target" if target is None else f"{100 * target:.1f}%"
    columns: dict[str, Callable[[Summary], str]] = {
        "Run": lambda row: row.label,
        "Final accuracy (%)": lambda row: _number(row.final_accuracy, 100, ".2f"),
        "Best accuracy (%)": lambda row: _number(row.best_accuracy, 100, ".2f"),
        "Final loss": lambda row: _UNKNOWN if row.final_loss is None else significant(row.final_loss, 4),
        f"Time ({time.symbol})": lambda row: _number(row.time, 1 / time.size, ".1f"),
        f"Time to {goal} ({time.symbol})": lambda row: _number(row.time_to_target, 1 / time.size, ".1f"),
        f"Bytes per rank ({size.symbol})": lambda row: (
            _number(row.bytes_per_rank, 1 / size.size, ".1f") + " shared" * row.shared
        ),
        "Compression (÷)": lambda row: _number(row.compression, 1, ".2f"),
        "Waiting (%)": lambda row: _number(row.waiting, 100, ".1f"),
        "Slowest rank (÷ median)": _slowest,
    }
    return list(columns), [[write(row) for write in columns.values()] for row in rows]


def _summary(run: RunRecord, label: str, target: float | None) -> Summary:
    test, last = run.test, run.last
    shared = uses_mostly_shared_memory(run) and bool(last.bytes_shared[-1].any())
    moved, saved = moved_bytes(run, last)[-1], last.bytes_saved[-1]
    slowest, slowdown = _straggler(run)
    return Summary(
        label=label,
        final_accuracy=float(test.accuracy[-1]) if len(test) else None,
        best_accuracy=_best(run),
        final_loss=float(test.loss[-1]) if len(test) else None,
        time=float(last.time[-1]),
        time_to_target=_time_to(run, target),
        bytes_per_rank=float(moved.mean()),
        shared=shared,
        compression=float((moved + saved).sum() / moved.sum()) if saved.any() else None,
        waiting=_waiting(run),
        slowest_rank=slowest,
        slowdown=slowdown,
    )


def _best(run: RunRecord) -> float | None:
    finite = run.test.accuracy[np.isfinite(run.test.accuracy)]
    return float(finite.max()) if len(finite) else None


def _time_to(run: RunRecord, target: float | None) -> float | None:
    if target is None:
        return None
    reached = np.flatnonzero(run.test.accuracy >= target - _ROUNDING)
    return float(run.test.time[reached[0]]) if len(reached) else None


def _waiting(run: RunRecord) -> float | None:
    if not len(run.train):
        return None
    waited = run.train.wait_seconds[-1].sum()
    total = waited + run.train.compute_seconds[-1].sum()
    return float(waited / total) if total > 0 else None


def _straggler(run: RunRecord) -> tuple[int | None, float | None]:
    if not len(run.train) or run.ranks == 1:
        return None, None
    compute = run.train.compute_seconds[-1]
    rank, median = int(compute.argmax()), float(np.median(compute))
    return rank, float(compute[rank]) / median if median > 0 else None


def _slowest(row: Summary) -> str:
    if row.slowest_rank is None:
        return _UNKNOWN
    return f"{row.slowest_rank}" + ("" if row.slowdown is None else f" ({row.slowdown:.2f})")


def _number(value: float | None, scale: float, form: str) -> str:
    return _UNKNOWN if value is None else format(value * scale, form)
