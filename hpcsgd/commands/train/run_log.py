"""The journal of a run: its records in a file and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcsgd.commands.train.console import Display
from hpcsgd.commands.train.metrics import Counters, Recorder, Sums, spent


class Journal:
    """What rank 0 writes down of a run and shows; on other ranks the same calls do nothing.

    Parameters
    ----------
    folder
        The run's.
    rank
        This rank.
    step
        Steps already taken: records of later ones are dropped.
    total, epochs
        Length of the run.
    steps_per_epoch
        For the records' epochs.
    mode
        How to show it, see `Display`.
    keep
        See `Recorder`.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        step: int,
        total: int,
        epochs: float,
        steps_per_epoch: int,
        mode: str,
        keep: int | None = None,
    ) -> None:
        self._steps_per_epoch = steps_per_epoch
        self._recorder = Recorder(folder, step, keep) if rank == 0 else None
        self._display = Display(mode if rank == 0 else "off", total, step, epochs)

    def say(self, text: str) -> None:
        """A message to who watches."""
        self._display.say(text)

    def train(
        self,
        step: int,
        counters: Sequence[Counters],
        sums: Sums,
        since: Counters,
        learning_rate: float,
        method: Sequence[Mapping[str, Any]],
    ) -> None:
        """Record the training since rank 0 had spent `since`, with each rank's figures of the method."""
        figures = {
            "loss": sums.mean_loss,
            "accuracy": sums.accuracy,
            "samples_per_second": round(sums.samples / (counters[0].seconds - since.seconds), 1),
            "learning_rate": learning_rate,
            **{name: [figures[name] for figures in method] for name in method[0]},
        }
        self._display.train(self.write("train", step, counters, {**figures, **spent(counters)}))

    def test(self, step: int, counters: Sequence[Counters], sums: Sums, distance: float) -> None:
        """Record an evaluation of the consensus model, from which the models have a distance."""
        figures = {"loss": sums.mean_loss, "accuracy": sums.accuracy, "consensus_distance": distance}
        self._display.test(self.write("test", step, counters, {**figures, **spent(counters)}))

    def write(
        self, event: str, step: int, counters: Sequence[Counters], figures: dict[str, Any]
    ) -> dict[str, Any]:
        """Record figures of a step under the name of an event; returns the whole record."""
        record = {
            "event": event,
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 6),
            "time": round(counters[0].seconds, 6),
            **figures,
        }
        if self._recorder is not None:
            self._recorder.write(record)
        return record

    def close(self) -> None:
        self._display.close()
        if self._recorder is not None:
            self._recorder.close()
