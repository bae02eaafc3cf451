"""LASGD: averages of all models that run beside the training, for which nobody waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

from hpcsgd.collectives import allreduce
from hpcsgd.collectives.reducer import reduction
from hpcsgd.compress import Compressor
from hpcsgd.errors import BadOption, unknown
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.lasgd.averaging import NO_GOAL, Averaging, Records
from hpcsgd.strategies.lasgd.model_delta import Delta, Merge
from hpcsgd.strategies.lasgd.schedule import Adaptive, Fixed, Trigger, damping, wanted
from hpcsgd.strategies.replicas import OwnModels
from hpcsgd.tensors.group import TensorGroup


class LASGD(OwnModels):
    """Local asynchronous SGD: exact averages by all-reduce beside the gradients (arXiv 2203.13085).

    From the paper (Avidor, Tal Israel): asynchronous, decentralised, all-reduce for synchronisation. Our
    reading: a round takes a snapshot s of every rank's model x and averages these, all in the
    communication thread, while forward, backward and whole steps go on. At the end of the step in which
    the average r arrives, x <- x + (r - s). So no gradient delays a round and no round a gradient, the mean
    of all models changes by gradient steps alone, and an average is never older than a round takes.

    Optimizer state stays local. Iterations are the steps of all ranks divided by their number; a rank may
    take more steps than another, or none. When the run is closed all models become their mean. Memory of
    three more models; of four with compression, of what they changed since the last average.

    Parameters
    ----------
    period
        Steps that a rank takes between two snapshots before it wants another, or "auto", see
        `hpcsgd.strategies.lasgd.schedule`. Default "auto".
    max_lag
        The most steps between two merges, and between a snapshot and its merge; at least `period`. A rank
        then waits for the round: the only wait there is. None (default): any number. With trigger "all" and
        `max_lag` equal to `period` all ranks take equally many steps: that is local SGD.
    trigger
        Who must want a round so that it starts: "any" rank (default), or "all"; "free": nobody.
    merge
        "damped" (default): x <- x + (r - s) / lag, where a round lasts longer than a step of the fastest
        rank, by so many steps; else, and always with "delta", as above. "overwrite": x <- r, which loses the
        steps since the snapshot.
    compress
        How changes since the last average are compressed; default: as the run's option says.
    """

    lockstep = False

    def __init__(
        self,
        period: int | Literal["auto"] = "auto",
        max_lag: int | None = None,
        trigger: Trigger = "any",
        merge: Merge = "damped",
        compress: Compressor | None = None,
    ) -> None:
        if trigger not in ("any", "all", "free"):
            raise unknown("trigger of LASGD", trigger, ("any", "all", "free"))
        if merge not in ("damped", "delta", "overwrite"):
            raise unknown("merge of LASGD", merge, ("damped", "delta", "overwrite"))
        if period != "auto" and (not isinstance(period, int) or period < 1):
            raise BadOption("period of LASGD", expected="at least 1 step, or auto", got=period)
        least = 1 if period == "auto" else period
        if max_lag is not None and max_lag < least:
            what = "LASGD would wait for a round that no rank wants yet"
            raise BadOption(what, expected=f"max_lag of at least {least}, the period", got=max_lag)
        self.period, self.max_lag, self.trigger, self.merge = period, max_lag, trigger, merge
        self.compress = compress

    def options(self) -> dict[str, object]:
        return {
            "period": self.period,
            "max_lag": self.max_lag,
            "trigger": self.trigger,
            "merge": self.merge,
            "compress": str(self.compress),
        }

    def attach(self, setting: Setting) -> None:
        setting.refuse("LASGD", virtual_nodes=True)
        super().attach(setting)
        self._in_step = self.trigger == "all" and self.max_lag == self.period
        self._period = Adaptive(self.max_lag) if self.period == "auto" else Fixed(self.period)
        model, scheme = self.parameters.group, self.compress or setting.compress
        average = TensorGroup(
            setting.world,
            [(name, p) for name, p in setting.parameters if p.requires_grad],
            setting.bucket_mib,
        )
        what = "change" if scheme else "model"
        sums = reduction(average, setting.algorithm, scheme, setting.seed, what=what)
        delta = Delta(model, average, sums, self.merge, changes=scheme is not None)
        self._averaging = Averaging(setting.world, delta, self._wanted, self._share, self.max_lag)

    def detach(self) -> None:
        self._averaging.close()
        allreduce(self.parameters.group, algorithm=self.setting.algorithm)
        del self._averaging, self._period
        super().detach()

    def turns(self, end: int) -> Iterator[int]:
        averaging, ranks = self._averaging, self.setting.world.size
        averaging.goal = end * ranks
        try:
            while averaging.steps < end if self._in_step else not averaging.done():
                averaging.begin()
                yield 0
            averaging.rest()
            self.setting.step = end
        finally:
            averaging.goal = NO_GOAL

    def step(self, update: Callable[[], None]) -> None:
        self._averaging.step(update)
        averaging, ranks = self._averaging, self.setting.world.size
        steps = ranks * averaging.steps if self._in_step else averaging.total()
        self.setting.step = min(steps, averaging.goal) // ranks

    def _wanted(self, records: Records) -> float:
        return wanted(records, self.trigger, self._period.of(records))

    def _share(self, records: Records) -> float:
        damped = self.merge == "damped" and not self._in_step
        return damping(records, self.max_lag) if damped else 1.0

    def averaged(self) -> AbstractContextManager[None]:
        self._averaging.rest()
        return super().averaged()

    def consensus_distance(self) -> float:
        self._averaging.rest()
        return super().consensus_distance()

    def figures(self) -> dict[str, Any]:
        """Of the rounds since the last call, see `Tally.figures`."""
        return {"period": self._period.steps, **self._averaging.tally.figures()}

    def state_dict(self) -> dict[str, Any]:
        """Collective."""
        return {**self._averaging.state_dict(), "period": self._period.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averaging.load_state_dict(state)
        self._period.steps = state["period"]
