"""Sample run folders for tests, in the format of a real run."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

CONFIG = {"data": "digits", "model": "mlp", "strategy": "allreduce", "batch": 32, "seed": 0}


def train(step: int, ranks: int = 4, **changes: Any) -> dict[str, Any]:
    """A training record: rank r computes for (r + 1) ms per step, and waits for the slowest rank."""
    compute = [step * (rank + 1) / 1000 for rank in range(ranks)]
    row = {
        "event": "train",
        "step": step,
        "epoch": step / 32,
        "time": step / 10,
        "loss": 2.0 / (1 + step),
        "accuracy": 0.5,
        "samples_per_second": 5100.0,
        "learning_rate": 0.1,
        "bytes_sent": [1000 * step + rank for rank in range(ranks)],
        "bytes_shared": [7 * step] * ranks,
        "bytes_saved": [0] * ranks,
        "compute_seconds": compute,
        "wait_seconds": [max(compute) - own for own in compute],
        "communication_seconds": [0.001 * step] * ranks,
    }
    return row | changes


def test(step: int, ranks: int = 4, **changes: Any) -> dict[str, Any]:
    """An evaluation record, 0.05 s after the training record of the same step."""
    row = {
        "event": "test",
        "step": step,
        "epoch": step / 32,
        "time": step / 10 + 0.05,
        "loss": 3.0 / (1 + step),
        "accuracy": 1 - 1 / (1 + step),
        "consensus_distance": 0.0,
        "bytes_sent": [1000 * step + rank for rank in range(ranks)],
        "bytes_shared": [7 * step] * ranks,
        "bytes_saved": [0] * ranks,
    }
    return row | changes


test.__test__ = False  # type: ignore[attr-defined]


def usual(ranks: int = 4, **changes: Any) -> list[dict[str, Any]]:
    """Five training and five evaluation records, with the same changes in each."""
    return [make(step, ranks, **changes) for step in range(10, 60, 10) for make in (train, test)]


def write_run(
    folder: Path,
    rows: list[dict[str, Any]] | None = None,
    *,
    end: str = "\n",
    done: bool = True,
    **config: Any,
) -> Path:
    """Write a run folder; `end` is appended to the last record, and `done` marks the end of the run."""
    rows = usual() if rows is None else rows
    ranks = len(rows[0]["bytes_sent"]) if rows else 1
    folder.mkdir(parents=True)
    settings = [f"{key} = {json.dumps(value)}" for key, value in (CONFIG | config).items()]
    settings += ["", "[world]", f"ranks = {ranks}", "nodes = 1", f'run = "{uuid.uuid4().hex}"', ""]
    (folder / "config.toml").write_text("\n".join(settings))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
    if done:
        (folder / "done").touch()
    return folder
