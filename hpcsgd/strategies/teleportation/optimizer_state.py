"""An optimizer's state in tensor groups, so that it can move from peer to peer with its model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup

_NUMBERS = "numbers"

#: For each parameter that gets a state: the parameter, and what its state looks like.
Layout = list[tuple[Tensor, dict[str, Any]]]


class CarriedState:
    """The optimizer's state of each peer of this rank, all of it in one group a peer.

    Its tensors are views of the group, which the optimizer updates in place; its numbers, and which
    parameters have a state so far, are in a float64 vector at the end.

    Parameters
    ----------
    world
        The ranks; collective when made.
    optimizer
        The run's; what it keeps is found by a step of a copy of it with zero gradients.
    copies
        Peers of this rank; all begin with the state that the optimizer has.
    bucket_mib
        Size of a bucket in MiB.

    Attributes
    ----------
    groups
        One a peer; none where the optimizer keeps no state.

    Raises
    ------
    BadOption
        The optimizer keeps something else than tensors and numbers for each parameter.
    """

    def __init__(
        self, world: World, optimizer: torch.optim.Optimizer, copies: int, bucket_mib: float
    ) -> None:
        self._world, self._optimizer = world, optimizer
        self._layout = _layout(optimizer)
        self._names = [
            {key: f"{number}.{key}" for key, value in entries.items() if _in_place(value, parameter)}
            for number, (parameter, entries) in enumerate(self._layout)
        ]
        templates = [
            (name, entries[key])
            for (_, entries), names in zip(self._layout, self._names, strict=True)
            for key, name in names.items()
        ]
        world.agree({"state of the optimizer": [(n, tuple(t.shape), str(t.dtype)) for n, t in templates]})
        count = sum(1 + len(entries) for _, entries in self._layout)
        templates.append((_NUMBERS, torch.zeros(count, dtype=torch.float64)))
        made = range(copies if self._layout else 0)
        self.groups = [TensorGroup(world, templates, bucket_mib) for _ in made]
        self._arrived = set(made)
        for index in made:
            self.keep(index)

    def arrived(self, index: int) -> None:
        """A peer's group has a new content, which the optimizer shall go on from."""
        self._arrived.add(index)

    def give(self, index: int) -> None:
        """Let the optimizer go on from what has arrived for a peer whose turn it is."""
        if index not in self._arrived or not self.groups:
            return
        self._arrived.remove(index)
        views = self.groups[index].views
        numbers = iter(views[_NUMBERS].tolist())
        for (parameter, entries), names in zip(self._layout, self._names, strict=True):
            begun = next(numbers)
            state = {
                key: views[names[key]] if key in names else _like(entries[key], number)
                for key, number in zip(entries, numbers, strict=False)
            }
            if begun:
                self._optimizer.state[parameter] = state
            else:
                self._optimizer.state.pop(parameter, None)

    def keep(self, index: int) -> None:
        """Note what the optimizer has made of a peer's state in its step."""
        if not self.groups:
            return
        views = self.groups[index].views
        numbers: list[float] = []
        for (parameter, entries), names in zip(self._layout, self._names, strict=True):
            state = self._optimizer.state.get(parameter)
            numbers.append(float(bool(state)))
            if not state:
                numbers.extend([0.0] * len(entries))
                continue
            if state.keys() != entries.keys():
                got = f"the entries {', '.join(state)}, at first {', '.join(entries)}"
                raise _refused(self._optimizer, got, self._world.rank)
            for key, value in state.items():
                if key not in names:
                    numbers.append(0.0 if value is None else float(value))
                    continue
                numbers.append(0.0)
                view = views[names[key]]
                if value is not view:
                    view.copy_(value)
                    state[key] = view
        views[_NUMBERS].copy_(torch.tensor(numbers, dtype=torch.float64))

    def copy(self, index: int) -> list[Tensor]:
        """A peer's state now, one flat tensor a bucket, on the host."""
        return [bucket.flat.cpu().clone() for bucket in self.groups[index]]

    def restore(self, index: int, values: list[Tensor]) -> None:
        """Take back what `copy` gave."""
        for bucket, value in zip(self.groups[index], values, strict=True):
            bucket.flat.copy_(value)
        self.arrived(index)


def _layout(optimizer: torch.optim.Optimizer) -> Layout:
    """What the optimizer keeps for each parameter once it has taken a step."""
    trial = copy.deepcopy(optimizer)
    try:
        for parameter in _parameters(trial):
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trial.step()
    except Exception as error:
        raise _refused(optimizer, f"{type(error).__name__} in a step on trial: {error}") from error
    layout = [
        (own, dict(trial.state[its]))
        for own, its in zip(_parameters(optimizer), _parameters(trial), strict=True)
        if trial.state.get(its)
    ]
    for parameter, entries in layout:
        for key, value in entries.items():
            if isinstance(value, Tensor):
                fits = _in_place(value, parameter) or value.dim() == 0
            else:
                fits = value is None or isinstance(value, int | float)
            if not fits:
                raise _refused(optimizer, f"{key} of type {type(value).__name__}")
    return layout


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _in_place(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.device == parameter.device


def _like(template: Any, number: float) -> Any:
    """A number as the optimizer keeps it: as a tensor on the host, or by itself."""
    if isinstance(template, Tensor):
        return torch.full_like(template, number)
    return None if template is None else type(template)(number)


def _refused(optimizer: torch.optim.Optimizer, got: str, rank: int | None = None) -> HpcsgdError:
    return BadOption(
        f"the state of {type(optimizer).__name__} cannot travel with a model",
        rank=rank,
        expected="always the same tensors and numbers for each parameter",
        got=got,
        do="use SGD, Adam or another optimizer of torch.optim whose step() takes no closure",
        everywhere=rank is None,
    )
