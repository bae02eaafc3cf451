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
    """The columns that training and evaluation records share, with one row per record.

    Parameters
    ----------
    step
        Steps completed, int64 of shape (records,).
    epoch
        Passes over the data, float64 of shape (records,).
    time
        Wall-clock seconds since the first step, float64 of shape (records,).
    loss, accuracy
        The mean loss, and the accuracy from 0 to 1, float64 of shape (records,); may be NaN or
        infinite.
    bytes_sent, bytes_shared, bytes_saved
        Bytes since the first step that each rank sent in MPI messages, moved through node-shared memory, and
        saved of either by compression, int64 of shape (records, ranks).
    """

    step: Integers
    epoch: Floats
    time: Floats
    loss: Floats
    accuracy: Floats
    bytes_sent: Integers
    bytes_shared: Integers
    bytes_saved: Integers

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True)
class TrainingRecords(Columns):
    """The training records.

    Parameters
    ----------
    samples_per_second, learning_rate
        Samples per second over all ranks, and the learning rate, float64 of shape (records,).
    compute_seconds, wait_seconds, communication_seconds
        Seconds since the first step on each rank, float64 of shape (records, ranks).
    """

    samples_per_second: Floats
    learning_rate: Floats
    compute_seconds: Floats
    wait_seconds: Floats
    communication_seconds: Floats


@dataclass(frozen=True)
class EvaluationRecords(Columns):
    """The evaluation records, which metrics.jsonl calls "test".

    Parameters
    ----------
    consensus_distance
        Root mean square distance of the peers' models from their mean, float64 of shape (records,).
    """

    consensus_distance: Floats


@dataclass(frozen=True)
class RunRecord:
    """The content of one run folder.

    Parameters
    ----------
    folder
        The absolute path of the folder.
    config
        The settings, with nested tables as in config.toml.
    config_text
        The text of config.toml.
    ranks
        The number of ranks.
    train, test
        The training and evaluation records; at most one of the two has no rows.
    notes
        Remarks on the records for the reader, one sentence each.
    """

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    ranks: int
    train: TrainingRecords
    test: EvaluationRecords
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> Columns:
        """The training or the evaluation records, whichever have the latest record."""
        if len(self.train) and len(self.test):
            return max(self.train, self.test, key=lambda columns: float(columns.time[-1]))
        return self.train if len(self.train) else self.test
