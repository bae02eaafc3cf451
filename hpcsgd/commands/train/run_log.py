"""The log of a run: its records, in a file and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcsgd.commands.train.console import ConsoleDisplay
from hpcsgd.commands.train.metrics import Counters, MetricsWriter, Sums, counter_fields


class RunLog:
    """Writes and displays the records of a run on rank 0; on other ranks the same calls do nothing."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        step: int,
        total: int,
        epochs: float,
        steps_per_epoch: int,
        mode: str,
    ) -> None:
        self._steps_per_epoch, self._writer = steps_per_epoch, writer
        self._display = ConsoleDisplay("off" if writer is None else mode, total, step, epochs)

    def message(self, text: str) -> None:
        """Display a message."""
        self._display.message(text)

    def train(
        self,
        step: int,
        counters: Sequence[Counters],
        sums: Sums,
        since: Counters,
        learning_rate: float,
        method: Sequence[Mapping[str, Any]],
    ) -> None:
        """Record the training of all ranks since the record at which rank 0 had the counters `since`.

        `counters` are the totals of each rank, and `method` the strategy's own metrics of each rank.
        """
        fields = {
            **_training_fields(counters, sums, since),
            "learning_rate": learning_rate,
            **{name: [metrics[name] for metrics in method] for name in method[0]},
        }
        self._display.train(self.write("train", step, counters, {**fields, **counter_fields(counters)}))

    def progress(self, step: int, counters: Sequence[Counters], sums: Sums, since: Counters) -> None:
        """Display the training since the last record; the parameters are those of `train`."""
        fields = {**_training_fields(counters, sums, since), **counter_fields(counters)}
        self._display.train(self._record("train", step, counters, fields))

    def test(self, step: int, counters: Sequence[Counters], sums: Sums, distance: float) -> None:
        """Record an evaluation of the consensus model, with the distance of the models from it."""
        fields = {"loss": sums.mean_loss, "accuracy": sums.accuracy, "consensus_distance": distance}
        self._display.test(self.write("test", step, counters, {**fields, **counter_fields(counters)}))

    def write(
        self, event: str, step: int, counters: Sequence[Counters], fields: dict[str, Any]
    ) -> dict[str, Any]:
        """Write a record of an event at a step, with further fields; returns the complete record."""
        record = self._record(event, step, counters, fields)
        if self._writer is not None:
            self._writer.write(record)
        return record

    def _record(
        self, event: str, step: int, counters: Sequence[Counters], fields: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "event": event,
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 6),
            "time": round(counters[0].seconds, 6),
            **fields,
        }

    def close(self) -> None:
        self._display.close()


def _training_fields(counters: Sequence[Counters], sums: Sums, since: Counters) -> dict[str, Any]:
    return {
        "loss": sums.mean_loss,
        "accuracy": sums.accuracy,
        "samples_per_second": round(sums.samples / (counters[0].seconds - since.seconds), 1),
    }
