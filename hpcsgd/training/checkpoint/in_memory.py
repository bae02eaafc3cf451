"""Checkpoints in memory, and the conversion of a run's state for another set of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsgd.mpi.world import World

State = Mapping[str, Any]


class InMemoryCheckpoints:
    """Copies of this rank's last two states, to continue from after other ranks have died.

    Two, because at the death of a rank some of the others may have made a copy that the rest have not.

    Attributes
    ----------
    run_folder
        Folder of the run, in which the surviving ranks continue; empty before it is known.
    lock
        Token of the lock of that folder, which they take over from a dead rank.
    """

    def __init__(self) -> None:
        self.run_folder = self.lock = ""
        self._states: dict[int, State] = {}
        self._number = 0

    def add(self, state: State) -> None:
        """Copy a state to the CPU; all ranks add their states in the same order."""
        previous = self._number
        self._number += 1
        self._states = {number: copy for number, copy in self._states.items() if number == previous}
        self._states[self._number] = _copied(state)

    def newest_common(self, world: World) -> State | None:
        """Return the newest state that all ranks of `world` have, and drop all others; None without one.

        Collective.
        """
        numbers_of_ranks = world.gather(list(self._states), "the numbers of the in-memory checkpoints")
        common = set.intersection(*map(set, numbers_of_ranks))
        if not common:
            return None
        self._number = max(common)
        self._states = {self._number: self._states[self._number]}
        return self._states[self._number]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    return value


def redistribute(states: Sequence[State], world: World, contributing: int) -> dict[str, Any]:
    """Return a state for this rank, from the states of other ranks than those of `world`; collective.

    All ranks get the mean of the newest models (the model of a peer that was idle is older). Everything else
    that belongs to one rank, such as its optimizer's state, is taken from the first of this rank's `states`.

    Parameters
    ----------
    states
        States from checkpoints or memory, at least one.
    world
        The ranks that continue.
    contributing
        Number of this rank's states, from the first, whose models enter the mean; other ranks contribute the
        rest. May be 0.
    """
    run = dict(states[0]["run"])
    newest = max(world.gather(max((s["run"]["model_step"] for s in states[:contributing]), default=-1)))
    models = [s["run"]["model"] for s in states[:contributing] if s["run"]["model_step"] == newest]
    count = sum(world.gather(len(models), "the number of models"))
    run["model"] = {
        name: _mean([model[name] for model in models], value, count, world)
        for name, value in run["model"].items()
    }
    return {**states[0], "run": run}


def _mean(values: Sequence[Tensor], like: Tensor, count: int, world: World) -> Tensor:
    if not like.is_floating_point():
        return like
    # In double precision the mean of equal numbers is that number.
    total = torch.zeros(like.shape, dtype=torch.float64, device="cpu")
    for value in values:
        total += value.cpu()
    what = "the mean of the models of the remaining ranks"
    with world.progress.waiting(what):
        world.control.allreduce(total.view(-1).numpy(), what)
    return (total / count).to(like)


def rescale_progress(
    state: State, steps_per_epoch: int, batches: int, accumulate: int | None
) -> dict[str, Any]:
    """Return the state with its position in the epochs in units of another set of ranks.

    Parameters
    ----------
    state
        Has `step`, `steps_per_epoch`, `batches` and `loaders`, the position of each loader.
    steps_per_epoch, batches
        Steps, and batches a rank, in an epoch of the ranks that continue.
    accumulate
        Batches a step if all peers take every step; None: the loaders' positions differ.
    """
    before = state["steps_per_epoch"]
    epoch, within = divmod(state["step"], before)
    within = min(-(-within * steps_per_epoch // before), steps_per_epoch - 1)
    step = epoch * steps_per_epoch + within
    position = {"step": step, "base": step, "epoch": epoch, "batch": 0}
    if accumulate is None:
        loaders = [
            {"epoch": at["epoch"], "batch": min(at["batch"] * batches // state["batches"], batches - 1)}
            for at in state["loaders"]
        ]
        return {**state, **position, "loaders": loaders}
    position["batch"] = min(within * accumulate, batches - 1)
    return {**state, **position, "loaders": [{"epoch": epoch, "batch": position["batch"]}]}
