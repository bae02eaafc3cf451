"""The length of a run, and the periods of its evaluations and checkpoints, in steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpcsgd.commands.train.settings import Settings


@dataclass(frozen=True)
class Plan:
    """Lengths and periods of a run, equal on all ranks."""

    batches: int  # batches a peer in an epoch
    #: Steps in an epoch, in the whole run, and with a rising learning rate.
    steps_per_epoch: int
    total: int
    warmup: int
    #: Periods, in steps, of evaluations, of checkpoints in files, and of checkpoints in memory; longer than
    #: the run if there are none.
    evaluate_every: int
    checkpoint_every: int
    snapshot_every: int
    log_every: int  # period of records of training; of an asynchronous method the step of the first one

    @classmethod
    def make(cls, settings: Settings, batches_of_peers: Sequence[int], synchronous: bool) -> Plan:
        """Plan a run, from the number of batches of each peer of all ranks in an epoch."""
        join = settings.uneven == "join" or not synchronous
        batches = max(batches_of_peers) if join else min(batches_of_peers)
        steps_per_epoch = math.ceil(batches / settings.accumulate)
        total = math.ceil(settings.epochs * steps_per_epoch)

        def in_steps(epochs: float) -> int:
            return max(1, round(epochs * steps_per_epoch)) if epochs else total + 1

        return cls(
            batches,
            steps_per_epoch,
            total,
            warmup=round(settings.warmup * steps_per_epoch),
            evaluate_every=in_steps(settings.evaluate_every),
            checkpoint_every=in_steps(settings.checkpoint_every),
            snapshot_every=in_steps(settings.keep_every if settings.on_failure == "shrink" else 0.0),
            log_every=settings.log_every,
        )

    def steps_to_next_stop(self, step: int) -> int:
        """Return the steps from `step` to the next evaluation, checkpoint or end, or to `log_every`."""
        periods = (self.evaluate_every, self.checkpoint_every, self.snapshot_every, self.total)
        stops = [every - step % every for every in periods]
        return min(*stops, self.log_every - step) if step < self.log_every else min(stops)

    def has_record(self, step: int, synchronous: bool) -> bool:
        """Return whether the settings require a record of training after a step, at whatever time."""
        if synchronous:
            return step % self.log_every == 0 or step == self.total
        return self.steps_to_next_stop(step - 1) == 1
