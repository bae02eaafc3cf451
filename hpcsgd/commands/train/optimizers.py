"""Optimizers by name, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import torch

from hpcsgd import registry
from hpcsgd.commands.options import OPTIMIZERS
from hpcsgd.registry import Within

T = TypeVar("T", bound=torch.optim.Optimizer)


def _row(kind: type[T], **limits: Any) -> Callable[..., T]:
    return registry.limited(_without_compiler(kind), **limits)


def _without_compiler(kind: type[T]) -> type[T]:
    """Return the class without its hooks for `torch.compile`, whose import takes longer than that of torch.

    Each method's wrapper imports the compiler at the first call, to leave the method out of compiled code.
    """
    body: dict[str, Any] = {"__module__": kind.__module__}
    for name in ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad"):
        method = getattr(kind, name)
        body[name] = getattr(method, "__wrapped__", method)
    # Pickles and copies are torch's own, by whose name the class is found.
    body["__reduce__"] = lambda self: (object.__new__, (kind,), self.__getstate__())
    body["step"] = torch.no_grad()(body["step"])  # as its wrapper does, but for differentiable optimizers
    return type(kind.__name__, (kind,), body)


_Share = Annotated[float, Within(0, 1)]
_Beta = Annotated[float, Within(0, 0.999999999)]
_Betas = tuple[_Beta, _Beta]
_Decay = Annotated[float, Within(0, 1e6)]
SGD = _row(torch.optim.SGD, momentum=_Share, dampening=_Share, weight_decay=_Decay)
Adam = _row(torch.optim.Adam, betas=_Betas, eps=_Share, weight_decay=_Decay)
AdamW = _row(torch.optim.AdamW, betas=_Betas, eps=_Share, weight_decay=_Decay)
_STEP_AT = (0.5, 0.75)
_STEP_FACTOR = 0.1


def build(spec: str, parameters: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make an optimizer from a spec: a name of `OPTIMIZERS`, and options.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    optimizer: torch.optim.Optimizer = registry.build(
        OPTIMIZERS, spec, "optimizer", params=parameters, lr=learning_rate
    )
    return optimizer


def learning_rate_schedule(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the step: a linear warm-up, then the schedule.

    "cosine" ends at 0; "step" is times 0.1 after half of the steps after the warm-up, and again after three
    quarters. `total` counts the steps of the warm-up too.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, total - warmup)
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if schedule == "step":
            return float(_STEP_FACTOR ** sum(done >= mark for mark in _STEP_AT))
        return 1.0

    return factor
