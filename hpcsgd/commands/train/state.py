"""The state of a run on one rank: position and sums, their checkpoint, and the state to resume from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from hpcsgd.commands.train import run_folder
from hpcsgd.commands.train.console import print_notice
from hpcsgd.commands.train.metrics import RECORDS, Counters, Meter, Sums
from hpcsgd.commands.train.on_failure import check_ranks_may_change
from hpcsgd.commands.train.plan import Plan
from hpcsgd.commands.train.settings import AUTO, Settings, parse_resume
from hpcsgd.mpi.world import World
from hpcsgd.training import rng_state
from hpcsgd.training.checkpoint.checkpoints import Checkpoints, Loaded
from hpcsgd.training.checkpoint.in_memory import InMemoryCheckpoints, State, redistribute, rescale_progress
from hpcsgd.training.data.loader import Loader
from hpcsgd.training.run import Run


class RunState:
    """The position of a run, its sums since the last record, and their checkpoint.

    Attributes
    ----------
    step, epoch, batch
        Steps taken, the current epoch, and batches of each peer within it.
    base
        Of these steps, those before the ranks of this run began: taken by another set of ranks.
    sums
        Loss and hits of this rank since the last record.
    logged
        This rank's counters at the last record.
    """

    def __init__(
        self, plan: Plan, loaders: Sequence[Loader], scaler: torch.amp.GradScaler, synchronous: bool
    ) -> None:
        self._plan, self._loaders, self._scaler, self._synchronous = plan, loaders, scaler, synchronous
        self.base = self.step = self.epoch = self.batch = 0
        self.sums = Sums()
        self.logged = Counters()

    def advance(self, run: Run, batches: int = 0) -> None:
        """Set the position after a step of all peers, or after steps of an asynchronous method.

        `batches` is the number that each peer of a synchronous method has used.
        """
        self.step = self.base + run.steps
        self.batch += batches
        if not self._synchronous:
            self.epoch = self.step // self._plan.steps_per_epoch
        elif self.batch == self._plan.batches:
            self.epoch, self.batch = self.epoch + 1, 0

    def capture(self, run: Run, meter: Meter) -> dict[str, Any]:
        """Return the contents of a checkpoint of this rank.

        `meter` is read last: its counters include those of the state that the run waits for.
        """
        return {
            "run": run.state_dict(),
            "scaler": self._scaler.state_dict(),
            "steps_per_epoch": self._plan.steps_per_epoch,
            "batches": self._plan.batches,
            "base": self.base,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "loaders": self._loader_positions(),
            "sums": asdict(self.sums),
            "logged": asdict(self.logged),
            "generators": rng_state.state(),
            "spent": asdict(meter.read()),
        }

    def restore(self, state: State, world: World) -> Counters:
        """Continue from a checkpoint but for the run's own contents, and return its counters; collective."""
        self._scaler.load_state_dict(state["scaler"])
        self.base, self.step = state["base"], state["step"]
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.sums, self.logged = Sums(**state["sums"]), Counters(**state["logged"])
        world.collectively(lambda: self._load_positions(state["loaders"]))
        rng_state.restore(state["generators"])
        return Counters(**state["spent"])

    def _loader_positions(self) -> list[dict[str, int]]:
        """Return the next position of each loader.

        It is the same for all loaders of a synchronous method, and beyond the last batch of the shorter ones.
        """
        if self._synchronous:
            return [{"epoch": self.epoch, "batch": self.batch} for _ in self._loaders]
        return [loader.state_dict() for loader in self._loaders]

    def _load_positions(self, positions: list[dict[str, int]]) -> None:
        for loader, position in zip(self._loaders, positions, strict=True):
            loader.load_state_dict(position)


class ResumePoint(NamedTuple):
    """A state to continue from."""

    state: dict[str, Any]
    #: If other ranks counted the steps: the step, in their count, after which metrics are discarded.
    last_record: int | None = None
    records: int | None = None  # number of records until the checkpoint; None: unknown

    @property
    def redistributed(self) -> bool:
        """True if the state is made from those of other ranks."""
        return self.last_record is not None


def find_resume_point(
    settings: Settings,
    world: World,
    plan: Plan,
    synchronous: bool,
    checkpoints: Checkpoints,
    snapshots: InMemoryCheckpoints,
) -> ResumePoint | None:
    """Find the state to continue from: in memory after a failure, else in a checkpoint; collective.

    None: a new run.

    Raises
    ------
    HpcsgdError
        On all ranks: the settings do not fit the checkpoint, or it cannot be loaded.
    """

    def convert(states: Sequence[State], contributing: int, records: int | None = None) -> ResumePoint:
        state = redistribute(states, world, contributing)
        accumulate = settings.accumulate if synchronous else None
        rescaled = rescale_progress(state, plan.steps_per_epoch, plan.batches, accumulate)
        return ResumePoint(rescaled, state["step"], records)

    snapshot = snapshots.newest_common(world)
    if snapshot is not None:
        return convert([snapshot], 1)
    found = _load(settings, world, checkpoints)
    if found is None:
        return None
    states, meta = found
    run_folder.check_unchanged(settings, meta["settings"])
    ranks, records = meta["ranks"], meta.get(RECORDS)  # older checkpoints have none
    if ranks == world.size:
        return ResumePoint(states[0], records=records)
    check_ranks_may_change(settings, f"a checkpoint of {ranks} ranks, and {world.size} ranks now")
    return convert(states, len(states) if world.rank < ranks else 0, records)


def _load(settings: Settings, world: World, checkpoints: Checkpoints) -> Loaded | None:
    any_ranks = settings.on_failure != "stop"
    if not settings.resume:
        return None
    if settings.resume != AUTO:
        return checkpoints.load(parse_resume(settings.resume)[1], any_ranks=any_ranks)
    found = checkpoints.load_newest_whole(any_ranks=any_ranks)
    if found is None:
        return None
    loaded, damaged = found
    if damaged and world.rank == 0:
        print_notice(f"the newest whole checkpoint is resumed; passed over: {'; '.join(damaged)}")
    return loaded
