"""The records of a run as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """The columns that training and evaluation records share, with one row per record."""

    step: Integers  # steps completed, int64 of shape (records,)
    epoch: Floats  # passes over the data, float64 of shape (records,)
    time: Floats  # wall-clock seconds since the first step, float64 of shape (records,)
    #: The mean loss, and the accuracy from 0 to 1, float64 of shape (records,); may be NaN or infinite.
    loss: Floats
    accuracy: Floats
    #: Bytes since the first step that each rank sent in MPI messages, moved through node-shared memory, and
    #: saved of either by compression, int64 of shape (records, ranks).
    bytes_sent: Integers
    bytes_shared: Integers
    bytes_saved: Integers

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class TrainingRecords(Columns):
    """The training records."""

    #: Samples per second over all ranks, and the learning rate, float64 of shape (records,).
    samples_per_second: Floats
    learning_rate: Floats
    #: Seconds since the first step on each rank, float64 of shape (records, ranks).
    compute_seconds: Floats
    wait_seconds: Floats
    communication_seconds: Floats


@dataclass(frozen=True)
class EvaluationRecords(Columns):
    """The evaluation records, which metrics.jsonl calls "test"."""

    #: Root mean square distance of the peers' models from their mean, float64 of shape (records,).
    consensus_distance: Floats


@dataclass(frozen=True)
class RunRecord:
    """The content of one run folder."""

    folder: Path  # absolute path of the folder
    config: Mapping[str, Any]  # settings, with nested tables as in config.toml
    config_text: str
    ranks: int
    #: The training and evaluation records; at most one of the two has no rows.
    train: TrainingRecords
    test: EvaluationRecords
    notes: tuple[str, ...] = ()  # remarks on the records for the reader, one sentence each

    @property
    def last(self) -> Columns:
        """The training or the evaluation records, whichever have the latest record."""
        if len(self.train) and len(self.test):
            return max(self.train, self.test, key=lambda columns: float(columns.time[-1]))
        return self.train if len(self.train) else self.test
