"""LASGD: averages of all models by all-reduce beside the training steps, without waiting for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.compress.base import Compressor
from hpcsgd.errors import BadOption
from hpcsgd.registry.limits import Count
from hpcsgd.strategies.asynchronous import AsynchronousStrategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.lasgd.averaging import Averaging, Records
from hpcsgd.strategies.lasgd.model_delta import Merge, ModelDelta
from hpcsgd.strategies.lasgd.schedule import AdaptivePeriod, FixedPeriod, Trigger, damping, steps_until_round
from hpcsgd.tensors.group import TensorGroup


@dataclass(eq=False, repr=False)
class LASGD(AsynchronousStrategy):
    """Local asynchronous SGD: exact averages by all-reduce beside the gradients (arXiv 2203.13085).

    From the paper (Avidor, Tal Israel): asynchronous, decentralised, all-reduce for synchronisation. Our
    reading: a round takes a snapshot s of every rank's model x and averages the snapshots in the
    communication thread, while forward, backward and whole steps continue. At the end of the step in which
    the average r arrives, x <- x + (r - s). So no gradient delays a round and no round a gradient, the mean
    of all models changes by gradient steps alone, and an average is never older than one round.

    Optimizer state stays local. Iterations are the steps of all ranks divided by their number; a rank may
    take more steps than another, or none. When the run is closed all models are replaced by their mean.
    Takes the memory of three more models; with compression, which is of the changes since the last average,
    of four.

    Parameters
    ----------
    period
        Steps of a rank between two snapshots, or "auto": adaptive, see
        `hpcsgd.strategies.lasgd.schedule.AdaptivePeriod`. Default "auto".
    max_lag
        Maximum of the steps between two merges, and between a snapshot and its merge; at least `period`. A
        rank then waits for the round: the only wait there is. None (default): any number. With trigger "all"
        and `max_lag` equal to `period` all ranks take equally many steps: that is local SGD.
    trigger
        A round starts when the period of "any" rank has passed (default), of "all" ranks, or at once after
        the last round ("free").
    merge
        "damped" (default): x <- x + (r - s) / lag, if a round takes `lag` > 1 steps of the fastest rank;
        otherwise, and always with "delta", as above. "overwrite": x <- r, which discards the steps since the
        snapshot.
    compress
        Compression scheme of the averages. Default: that of the run.

    Raises
    ------
    BadOption
        `max_lag` below `period`.
    """

    title = "LASGD"
    accepts_compression = True

    period: Count | Literal["auto"] = "auto"
    max_lag: Count | None = None
    trigger: Trigger = "any"
    merge: Merge = "damped"
    compress: Compressor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_lag is not None and self.period != "auto" and self.max_lag < self.period:
            raise BadOption(
                "option max_lag of LASGD is below its period: it would wait for a round before it is due",
                expected=f"max_lag of at least {self.period}, the period",
                got=self.max_lag,
                do="raise max_lag, lower period, or do not set max_lag",
            )

    def options(self) -> dict[str, object]:
        return {**super().options(), "compress": str(self.compress)}

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        self._equal_steps = self.trigger == "all" and self.max_lag == self.period
        self.deterministic |= self._equal_steps
        self._period = AdaptivePeriod(self.max_lag) if self.period == "auto" else FixedPeriod(self.period)
        model, scheme = self.parameters.group, self.compress or context.compress
        average = TensorGroup(context.world, self.parameters.templates, context.bucket_mib)
        kind = "change" if scheme else "model"
        reducer = make_reducer(average, context.algorithm, scheme, context.seed, kind=kind)
        delta = ModelDelta(model, average, reducer, self.merge, changes=scheme is not None)
        self._averaging = Averaging(
            context.world, delta, self._steps_until_round, self._damping, self.max_lag, lambda: self.target
        )

    def detach(self) -> None:
        self._averaging.close()
        del self._averaging, self._period
        super().detach()

    def disconnect(self) -> None:
        super().disconnect()
        if hasattr(self, "_averaging"):
            self._averaging.abandon()

    def begin_step(self) -> None:
        self._averaging.begin_step()

    def take_step(self, update: Callable[[], None]) -> None:
        self._averaging.step(update)

    def total_steps(self) -> int:
        averaging = self._averaging
        return self.context.world.size * averaging.steps if self._equal_steps else averaging.total_steps()

    def is_finished(self) -> bool:
        return super().is_finished() if self._equal_steps else self._averaging.is_finished()

    def settle(self) -> None:
        self._averaging.quiesce()

    def _steps_until_round(self, records: Records) -> float:
        return steps_until_round(records, self.trigger, self._period.update(records))

    def _damping(self, records: Records) -> float:
        damped = self.merge == "damped" and not self._equal_steps
        return damping(records, self.max_lag) if damped else 1.0

    def metrics(self) -> dict[str, Any]:
        """Return the current period, and the statistics of `RoundStatistics.metrics`."""
        return {"period": self._period.steps, **self._averaging.statistics.metrics()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state; only while quiescent."""
        return {**self._averaging.state_dict(), "period": self._period.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averaging.load_state_dict(state)
        self._period.steps = state["period"]
