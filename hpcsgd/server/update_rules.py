"""Update rules of a shard: optimizer steps with pushed gradients, or elastic averaging of pushed models."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import BadOption
from hpcsgd.tensors.weighted_sum import weighted_sum

#: Optimizers whose updates are elementwise, so that shards may cut a model anywhere.
OPTIMIZERS = (
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "RMSprop",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    "ASGD",
    "Rprop",
)
Options = Sequence[Mapping[str, Any]]  # one for each parameter group


class UpdateContext(NamedTuple):
    """Inputs of an update besides the values and the pushes."""

    weights: list[float]  # number of gradients whose mean is pushed, for each push
    clients: int  # number of awaited clients
    options: Options  # options of the optimizer, for each parameter group


class UpdateRule(Protocol):
    """Update rule of one shard.

    Attributes
    ----------
    takes_gradients
        Whether pushes are gradients and replies are the new values: a late push is then dropped. Else no push
        is ever dropped, and its reply replaces it in memory.
    parameter_groups
        Indices of the parameter groups whose options it uses.
    """

    takes_gradients: bool
    parameter_groups: frozenset[int]

    def apply(self, centre: Tensor, pushes: Sequence[Tensor], context: UpdateContext) -> None:
        """Update `centre`, (numel,), by pushes of this shape, in their order; they may be overwritten."""

    def validate(self, options: Options, dtype: torch.dtype) -> None:
        """Raise the exception, of any type, that an update with these options would raise."""

    def state_dict(self) -> dict[str, Any]:
        """State besides the values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`."""


class OptimizerRule:
    """Step of a `torch.optim` optimizer with the mean gradient; the reply is the new value.

    Parameters
    ----------
    name
        One of `OPTIMIZERS`.
    segments
        Segments (start, stop, parameter group) of the shard.
    """

    takes_gradients = True

    def __init__(self, name: str, segments: Sequence[tuple[int, int, int]]) -> None:
        self._optimizer_class, self._segments = getattr(torch.optim, name), segments
        self.parameter_groups = frozenset(number for _, _, number in segments)
        self._parts: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: dict[str, Any] | None = None

    def apply(self, centre: Tensor, pushes: Sequence[Tensor], context: UpdateContext) -> None:
        # Gradients that are not finite have weight 0.
        weighted = [(push, weight) for push, weight in zip(pushes, context.weights, strict=True) if weight]
        if not weighted:
            return
        gradient, options = weighted_mean(weighted), context.options
        optimizer = self._get_optimizer(centre, options)
        for part, (start, stop, _), group in zip(
            self._parts, self._segments, optimizer.param_groups, strict=True
        ):
            part.grad = gradient[start:stop]
            group.update({key: v for key, v in options[group["number"]].items() if key != "params"})
        optimizer.step()

    def validate(self, options: Options, dtype: torch.dtype) -> None:
        state = self.state_dict().get("state", {})
        for number, position in {group: i for i, (_, _, group) in enumerate(self._segments)}.items():
            element = torch.zeros(1, dtype=dtype, device="cpu")
            element.grad = torch.zeros_like(element)
            trial = self._optimizer_class([element], **options[number])
            saved = state.get(position, {}).items()
            trial.state[element].update({key: _first_element(value) for key, value in saved})
            trial.step()

    def _get_optimizer(self, centre: Tensor, options: Options) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._parts = [centre[start:stop] for start, stop, _ in self._segments]
            parameter_groups = [
                {**options[number], "params": [part], "number": number}
                for part, (_, _, number) in zip(self._parts, self._segments, strict=True)
            ]
            self._optimizer = self._optimizer_class(parameter_groups, lr=options[0]["lr"])
            if self._saved is not None:
                self._optimizer.load_state_dict(self._saved)
        return self._optimizer

    def state_dict(self) -> dict[str, Any]:
        if self._optimizer is None:
            return {} if self._saved is None else self._saved
        for part in self._parts:
            part.grad = None
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved, self._optimizer = state or None, None


class ElasticRule:
    """Elastic averaging (EASGD, arXiv 1412.6651): c <- c + sum e_i, e_i = alpha (x_i - c); replies are e_i.

    Parameters
    ----------
    alpha
        Fraction of its distance to the centre by which a model moves to it, and the centre to the model;
        None (default): 0.9 divided by the number of awaited clients.
    """

    takes_gradients = False
    parameter_groups: frozenset[int] = frozenset()

    def __init__(self, alpha: float | None = None) -> None:
        self._alpha = alpha

    def apply(self, centre: Tensor, pushes: Sequence[Tensor], context: UpdateContext) -> None:
        alpha = 0.9 / max(1, context.clients) if self._alpha is None else self._alpha
        if centre.element_size() >= 4:
            values = centre.numpy()
            _kernels().elastic_update(values, _addresses(pushes), values.dtype.type(alpha))
            return
        before = centre.clone()
        for push in pushes:
            centre.add_(push.sub_(before).mul_(alpha))

    def validate(self, options: Options, dtype: torch.dtype) -> None:
        """It uses no options."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It has no state."""


def weighted_mean(pushes: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Weighted mean of pushes, summed in this order; it overwrites the first push."""
    (out, first), tensors = pushes[0], [push for push, _ in pushes]
    if len(pushes) > 1 and out.element_size() >= 4 and all(weight == first for _, weight in pushes):
        values = out.numpy()
        _kernels().sum_pushes(values, _addresses(tensors), values.dtype.type(1.0 / len(pushes)))
    elif len(pushes) > 1:
        total = sum(weight for _, weight in pushes)
        weighted_sum(out, [(push, weight / total) for push, weight in pushes])
    return out


def describe_optimizer(optimizer: torch.optim.Optimizer) -> tuple[str, list[dict[str, Any]]]:
    """Name and JSON-compatible options of an optimizer.

    Raises
    ------
    BadOption
        If it is not one of `OPTIMIZERS`.
    """
    name = type(optimizer).__name__
    if name not in OPTIMIZERS or not type(optimizer).__module__.startswith("torch.optim."):
        raise BadOption(
            f"a parameter server cannot take steps of {type(optimizer).__name__}",
            expected="an optimizer of torch.optim with elementwise updates",
            do=f"use one of: {', '.join(OPTIMIZERS)}; or --strategy ps:mode=elastic, which works "
            "with any optimizer",
            everywhere=True,
        )
    known = inspect.signature(type(optimizer)).parameters
    parameter_groups = [
        {key: _to_json_value(value) for key, value in group.items() if key in known and key != "params"}
        for group in optimizer.param_groups
    ]
    fuses = "fused" in known and all(
        group.get("fused") is None and not group.get("foreach") for group in parameter_groups
    )
    for group in parameter_groups if fuses else ():
        group["fused"] = True  # one pass over memory
    return name, parameter_groups


def _to_json_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return list(value) if isinstance(value, tuple) else value


def _first_element(value: Any) -> Any:
    """Part of an optimizer's state that belongs to the first element."""
    if isinstance(value, Tensor):
        return (value[:1] if value.ndim else value).clone()
    return value


def _addresses(pushes: Sequence[Tensor]) -> np.ndarray:
    return np.array([push.data_ptr() for push in pushes], np.int64)


@functools.cache
def _kernels() -> Any:
    from hpcsgd.kernels.sums import server_update

    return server_update
