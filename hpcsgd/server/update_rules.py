"""What a server does with what its clients push: a step of an optimizer, or the elastic force."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import BadOption
from hpcsgd.tensors.weighted_sum import combine

#: Their updates treat each element alike, so a shard may cut a model anywhere.
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
Options = Sequence[Mapping[str, Any]]  # of each group of parameters


class Terms(NamedTuple):
    """What an update depends on besides the values and the pushes.

    Attributes
    ----------
    weights
        Of how many gradients each push is the mean.
    clients
        How many clients count.
    options
        The optimizer's, of each group of parameters.
    """

    weights: list[float]
    clients: int
    options: Options


class Rule(Protocol):
    """How one shard is updated.

    Attributes
    ----------
    takes_gradients
        Whether pushes are gradients, and answers the values: a push is then of no use once the others have
        gone on without it. Else a push is always of use, and its answer is written over it.
    groups
        Which options it takes.
    """

    takes_gradients: bool
    groups: frozenset[int]

    def apply(self, centre: Tensor, pushes: Sequence[Tensor], terms: Terms) -> None:
        """Update the values, (numel,), by pushes like them, in this order; these may be overwritten."""

    def try_out(self, options: Options, dtype: torch.dtype) -> None:
        """Raises, of whatever kind, what an update with these options would."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class Descent:
    """A step of a `torch.optim` optimizer with the mean gradient; the answer is the new value.

    Parameters
    ----------
    name
        One of `OPTIMIZERS`.
    segments
        (start, stop, group) of each stretch of the shard and the group of parameters that it belongs to.
    """

    takes_gradients = True

    def __init__(self, name: str, segments: Sequence[tuple[int, int, int]]) -> None:
        self._kind, self._segments = getattr(torch.optim, name), segments
        self.groups = frozenset(number for _, _, number in segments)
        self._parts: list[Tensor] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: dict[str, Any] | None = None

    def apply(self, centre: Tensor, pushes: Sequence[Tensor], terms: Terms) -> None:
        # Of weight 0 are gradients that are not finite.
        counted = [(push, weight) for push, weight in zip(pushes, terms.weights, strict=True) if weight]
        if not counted:
            return
        gradient, options = average(counted), terms.options
        optimizer = self._optimizer_of(centre, options)
        for part, (start, stop, _), group in zip(
            self._parts, self._segments, optimizer.param_groups, strict=True
        ):
            part.grad = gradient[start:stop]
            group.update({key: v for key, v in options[group["number"]].items() if key != "params"})
        optimizer.step()

    def try_out(self, options: Options, dtype: torch.dtype) -> None:
        state = self.state_dict().get("state", {})
        for number, position in {group: i for i, (_, _, group) in enumerate(self._segments)}.items():
            one = torch.zeros(1, dtype=dtype)
            one.grad = torch.zeros_like(one)
            trial = self._kind([one], **options[number])
            trial.state[one].update({key: _first(v) for key, v in state.get(position, {}).items()})
            trial.step()

    def _optimizer_of(self, centre: Tensor, options: Options) -> torch.optim.Optimizer:
        if self._optimizer is None:
            self._parts = [centre[start:stop] for start, stop, _ in self._segments]
            groups = [
                {**options[number], "params": [part], "number": number}
                for part, (_, _, number) in zip(self._parts, self._segments, strict=True)
            ]
            self._optimizer = self._kind(groups, lr=options[0]["lr"])
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


class Elastic:
    """c <- c + sum of e_i, e_i = alpha (x_i - c), see arXiv 1412.6651; the answers are the e_i.

    Parameters
    ----------
    alpha
        The share of its distance by which a model is drawn to the centre, and the centre to it; None: 0.9
        divided by the number of clients that count.
    """

    takes_gradients = False
    groups: frozenset[int] = frozenset()

    def __init__(self, alpha: float | None = None) -> None:
        self._alpha = alpha

    def apply(self, centre: Tensor, pushes: Sequence[Tensor], terms: Terms) -> None:
        alpha = 0.9 / max(1, terms.clients) if self._alpha is None else self._alpha
        if centre.element_size() >= 4:
            values = centre.numpy()
            _kernels().attract(values, _addresses(pushes), values.dtype.type(alpha))
            return
        before = centre.clone()
        for push in pushes:
            centre.add_(push.sub_(before).mul_(alpha))

    def try_out(self, options: Options, dtype: torch.dtype) -> None:
        """It takes none."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none."""


def average(pushes: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The weighted mean of pushes, added up in this order; written over the first one."""
    (out, first), tensors = pushes[0], [push for push, _ in pushes]
    if len(pushes) > 1 and out.element_size() >= 4 and all(weight == first for _, weight in pushes):
        values = out.numpy()
        _kernels().add_up(values, _addresses(tensors), values.dtype.type(1.0 / len(pushes)))
    elif len(pushes) > 1:
        total = sum(weight for _, weight in pushes)
        combine(out, [(push, weight / total) for push, weight in pushes])
    return out


def describe(optimizer: torch.optim.Optimizer) -> tuple[str, list[dict[str, Any]]]:
    """The name and the options of an optimizer, as a server can be told them.

    Raises
    ------
    BadOption
        For one that is no optimizer of `OPTIMIZERS`.
    """
    name = type(optimizer).__name__
    if name not in OPTIMIZERS or type(optimizer) is not getattr(torch.optim, name):
        raise BadOption(
            f"a parameter server cannot take steps of {type(optimizer).__name__}",
            expected="one of torch.optim whose update treats each element alike",
            do="use one of: " + ", ".join(OPTIMIZERS) + "; or mode elastic, where groups have any",
            everywhere=True,
        )
    known = inspect.signature(type(optimizer)).parameters
    groups = [
        {key: _plain(value) for key, value in group.items() if key in known and key != "params"}
        for group in optimizer.param_groups
    ]
    fuses = "fused" in known and all(
        group.get("fused") is None and not group.get("foreach") for group in groups
    )
    for group in groups if fuses else ():
        group["fused"] = True  # one pass over memory
    return name, groups


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return float(value)
    return list(value) if isinstance(value, tuple) else value


def _first(value: Any) -> Any:
    """Of an optimizer's state what belongs to the first element."""
    if isinstance(value, Tensor):
        return (value[:1] if value.ndim else value).clone()
    return value


def _addresses(pushes: Sequence[Tensor]) -> np.ndarray:
    return np.array([push.data_ptr() for push in pushes], np.int64)


@functools.cache
def _kernels() -> Any:
    from hpcsgd.kernels.sums import server_update

    return server_update
