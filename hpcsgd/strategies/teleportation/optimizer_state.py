"""Optimizer state as tensor groups, which can be transferred between peers with the model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup

_NUMBERS = "numbers"

#: (parameter, entries) for each parameter that has a state after a step; the entries' values are examples.
StateTemplate = list[tuple[Tensor, dict[str, Any]]]


class PortableOptimizerState:
    """The optimizer states of the local peers, each in one tensor group; collective when made.

    The tensors of a state are views of the group, which the optimizer updates in place; its numbers, and
    flags of the parameters that have a state so far, are in a float64 vector at the end.

    Parameters
    ----------
    world
        The ranks.
    optimizer
        The optimizer of the run; a step of a copy with zero gradients shows the entries of its state.
    copies
        Number of local peers; all start with the current state of the optimizer.
    bucket_mib
        Size of a bucket in MiB.

    Attributes
    ----------
    groups
        One for each local peer; none if the optimizer has no state.

    Raises
    ------
    BadOption
        The state has entries other than tensors and numbers of each parameter.
    """

    def __init__(
        self, world: World, optimizer: torch.optim.Optimizer, copies: int, bucket_mib: float
    ) -> None:
        self._world, self._optimizer = world, optimizer
        self._template = _find_template(optimizer)
        self._names = [
            {key: f"{number}.{key}" for key, value in entries.items() if _is_on_device(value, parameter)}
            for number, (parameter, entries) in enumerate(self._template)
        ]
        templates = [
            (name, entries[key])
            for (_, entries), names in zip(self._template, self._names, strict=True)
            for key, name in names.items()
        ]
        world.check_consistent(
            {"state of the optimizer": [(n, tuple(t.shape), str(t.dtype)) for n, t in templates]}
        )
        count = sum(1 + len(entries) for _, entries in self._template)
        templates.append((_NUMBERS, torch.zeros(count, dtype=torch.float64, device="cpu")))
        made = range(copies if self._template else 0)
        self.groups = [TensorGroup(world, templates, bucket_mib) for _ in made]
        self._received = set(made)
        for index in made:
            self.store(index)

    def mark_received(self, index: int) -> None:
        """Record that the group of local peer `index` has new content."""
        self._received.add(index)

    def load(self, index: int) -> None:
        """Set the optimizer's state to that of local peer `index`, if it has new content."""
        if index not in self._received or not self.groups:
            return
        self._received.remove(index)
        views = self.groups[index].views
        numbers = iter(views[_NUMBERS].tolist())
        for (parameter, entries), names in zip(self._template, self._names, strict=True):
            has_state = next(numbers)
            state = {
                key: views[names[key]] if key in names else _number_like(entries[key], number)
                for key, number in zip(entries, numbers, strict=False)
            }
            if has_state:
                self._optimizer.state[parameter] = state
            else:
                self._optimizer.state.pop(parameter, None)

    def store(self, index: int) -> None:
        """Copy the optimizer's state, after a step, to the group of local peer `index`."""
        if not self.groups:
            return
        views = self.groups[index].views
        numbers: list[float] = []
        for (parameter, entries), names in zip(self._template, self._names, strict=True):
            state = self._optimizer.state.get(parameter)
            numbers.append(float(bool(state)))
            if not state:
                numbers.extend([0.0] * len(entries))
                continue
            if state.keys() != entries.keys():
                got = f"the entries {', '.join(state)}, at first {', '.join(entries)}"
                raise _unsupported(self._optimizer, got, self._world.rank)
            for key, value in state.items():
                if key not in names:
                    numbers.append(0.0 if value is None else float(value))
                    continue
                numbers.append(0.0)
                view = views[names[key]]
                if value is not view:
                    view.copy_(value)
                    state[key] = view
        views[_NUMBERS].copy_(torch.tensor(numbers, dtype=torch.float64, device="cpu"))

    def copy(self, index: int) -> list[Tensor]:
        """Return the state of local peer `index`, one flat tensor a bucket, on the host."""
        return [bucket.flat.cpu().clone() for bucket in self.groups[index]]

    def restore(self, index: int, values: list[Tensor]) -> None:
        """Restore the state that `copy` returned."""
        for bucket, value in zip(self.groups[index], values, strict=True):
            bucket.flat.copy_(value)
        self.mark_received(index)


def _find_template(optimizer: torch.optim.Optimizer) -> StateTemplate:
    """Return the entries of the optimizer's state, as found by a step of a copy of it."""
    trial = copy.deepcopy(optimizer)
    try:
        for parameter in _parameters(trial):
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        trial.step()
    except Exception as error:
        raise _unsupported(optimizer, f"{type(error).__name__} in a trial step: {error}") from error
    found = [
        (parameter, dict(trial.state[trial_parameter]))
        for parameter, trial_parameter in zip(_parameters(optimizer), _parameters(trial), strict=True)
        if trial.state.get(trial_parameter)
    ]
    for parameter, entries in found:
        for key, value in entries.items():
            if isinstance(value, Tensor):
                supported = _is_on_device(value, parameter) or value.dim() == 0
            else:
                supported = value is None or isinstance(value, int | float)
            if not supported:
                raise _unsupported(optimizer, f"{key} of type {type(value).__name__}")
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_on_device(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.device == parameter.device


def _number_like(template: Any, number: float) -> Any:
    """Return a number in the type of an entry: a tensor on the host, a Python number, or None."""
    if isinstance(template, Tensor):
        return torch.full_like(template, number)
    return None if template is None else type(template)(number)


def _unsupported(optimizer: torch.optim.Optimizer, got: str, rank: int | None = None) -> HpcsgdError:
    return BadOption(
        f"TELEPORTATION cannot transfer the optimizer state of {type(optimizer).__name__}",
        rank=rank,
        expected="a fixed set of tensors and numbers for each parameter",
        got=got,
        do="use SGD, Adam or another optimizer of torch.optim whose step() takes no closure",
        everywhere=rank is None,
    )
