"""Records of a run: its metrics as columns."""

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
    """What training and test records have in common, one row a record.

    Parameters
    ----------
    step
        Steps done, int64 of shape (records,).
    epoch
        Passes over the data, float64 of shape (records,).
    time
        Wall clock since the first step in seconds, float64 of shape (records,).
    loss, accuracy
        The mean loss, and the accuracy from 0 to 1, float64 of shape (records,); may be NaN or
        infinite.
    bytes_sent, bytes_shared, bytes_saved
        Bytes since the first step that each rank handed to MPI messages, moved through memory shared by
        a node, and was spared of either by compression, int64 of shape (records, ranks).
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
class Training(Columns):
    """The training records.

    Parameters
    ----------
    samples_per_second, learning_rate
        float64 of shape (records,).
    compute_seconds, wait_seconds, communication_seconds
        Seconds since the first step on each rank, float64 of shape (records, ranks).
    """

    samples_per_second: Floats
    learning_rate: Floats
    compute_seconds: Floats
    wait_seconds: Floats
    communication_seconds: Floats


@dataclass(frozen=True)
class Evaluation(Columns):
    """The test records.

    Parameters
    ----------
    consensus_distance
        How far the ranks' models are from their mean, float64 of shape (records,).
    """

    consensus_distance: Floats


@dataclass(frozen=True)
class RunRecord:
    """What one run folder holds.

    Parameters
    ----------
    folder
        The absolute path of the folder.
    config
        The settings, tables within tables as in the file.
    config_text
        The file of settings as it is written.
    ranks
        The number of ranks.
    train, test
        The records; either may have no rows, never both.
    notes
        What a reader of the numbers should know, one sentence each.
    """

    folder: Path
    config: Mapping[str, Any]
    config_text: str
    ranks: int
    train: Training
    test: Evaluation
    notes: tuple[str, ...] = ()

    @property
    def last(self) -> Columns:
        """The columns, of the two, whose last record is the latest."""
        if len(self.train) and len(self.test):
            return max(self.train, self.test, key=lambda columns: float(columns.time[-1]))
        return self.train if len(self.train) else self.test
