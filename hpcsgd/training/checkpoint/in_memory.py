"""The state of a run in memory, and how it is taken up by other ranks than those that had it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsgd.mpi.world import World

State = Mapping[str, Any]


class Kept:
    """The last two states of this rank, for going on without ranks that have died.

    Two, because when a rank dies some of the others may have made a copy that the rest have not.

    Attributes
    ----------
    folder
        Of the run.
    """

    def __init__(self) -> None:
        self.folder = ""
        self._states: dict[int, State] = {}
        self._number = 0

    def add(self, state: State) -> None:
        """Copy a state; on all ranks, one after the other in the same order."""
        self._number += 1
        self._states = {number: kept for number, kept in self._states.items() if number == self._number - 1}
        self._states[self._number] = _copied(state)

    def common(self, world: World) -> State | None:
        """The newest state that all ranks of a world have, from now on the only one; None: there is none."""
        told = world.gather(list(self._states), "a state that all ranks have")
        numbers = set.intersection(*map(set, told))
        if not numbers:
            return None
        self._number = max(numbers)
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


def reform(states: Sequence[State], world: World, givers: int) -> dict[str, Any]:
    """One state for this rank of a world whose ranks are not those that had the states; collective.

    All get the mean of the models, of those that are newest (a peer that rests has an old one). What else
    belongs to a rank, its optimizer's state say, is that of the first state that it brings.

    Parameters
    ----------
    states
        Of checkpoints or in memory, at least one.
    world
        The ranks that go on.
    givers
        How many of the states count, for others bring the rest too.
    """
    own = dict(states[0]["run"])
    newest = max(world.gather(max((s["run"]["model_step"] for s in states[:givers]), default=-1)))
    models = [s["run"]["model"] for s in states[:givers] if s["run"]["model_step"] == newest]
    count = sum(world.gather(len(models), "the number of models"))
    own["model"] = {
        name: _mean([model[name] for model in models], value, count, world)
        for name, value in own["model"].items()
    }
    return {**states[0], "run": own}


def _mean(values: Sequence[Tensor], like: Tensor, count: int, world: World) -> Tensor:
    if not like.is_floating_point():
        return like
    # In double precision the mean of equal numbers is that number.
    total = torch.zeros(like.shape, dtype=torch.float64)
    for value in values:
        total += value.cpu()
    what = "the mean of the models that are left"
    with world.progress.waiting(what):
        world.control.allreduce(total.view(-1).numpy(), what)
    return (total / count).to(like)


def moved(state: State, steps_per_epoch: int, batches: int, accumulate: int | None) -> dict[str, Any]:
    """The same place in the epochs, counted in the steps and batches of other ranks.

    Parameters
    ----------
    state
        With `step`, `steps_per_epoch`, `batches` and `loaders`, the position of each loader.
    steps_per_epoch, batches
        Of the ranks that go on.
    accumulate
        Batches a step, where all peers keep step; None: each loader is somewhere else.
    """
    before = state["steps_per_epoch"]
    epoch, within = divmod(state["step"], before)
    within = min(-(-within * steps_per_epoch // before), steps_per_epoch - 1)
    step = epoch * steps_per_epoch + within
    place = {"step": step, "base": step, "epoch": epoch, "batch": 0}
    if accumulate is None:
        loaders = [
            {"epoch": at["epoch"], "batch": min(at["batch"] * batches // state["batches"], batches - 1)}
            for at in state["loaders"]
        ]
        return {**state, **place, "loaders": loaders}
    place["batch"] = min(within * accumulate, batches - 1)
    return {**state, **place, "loaders": [{"epoch": epoch, "batch": place["batch"]}]}
