"""Optimizers by name, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch

from hpcsgd import registry
from hpcsgd.registry import Within

_Share = Annotated[float, Within(0, 1)]
_Beta = Annotated[float, Within(0, 0.999999999)]
_Betas = tuple[_Beta, _Beta]
_Decay = Annotated[float, Within(0, 1e6)]
#: Names of `--optimizer`; the options are those of torch's classes.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": registry.limited(torch.optim.SGD, momentum=_Share, dampening=_Share, weight_decay=_Decay),
    "adam": registry.limited(torch.optim.Adam, betas=_Betas, eps=_Share, weight_decay=_Decay),
    "adamw": registry.limited(torch.optim.AdamW, betas=_Betas, eps=_Share, weight_decay=_Decay),
}
_STEP_AT = (0.5, 0.75)
_STEP_FACTOR = 0.1


def check(spec: str) -> None:
    """Check name and options of a spec.

    Raises
    ------
    BadOption
        Unknown name or option, or a value out of range.
    """
    registry.bind(OPTIMIZERS, spec, "optimizer", params=None, lr=None)


def learning_rate_schedule(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the step.

    Parameters
    ----------
    schedule
        "constant"; "cosine" (to 0 at the end); or "step" (times 0.1 after half of the steps after the
        warm-up, and again after three quarters).
    warmup
        Steps of the linear warm-up.
    total
        Steps of the run, with the warm-up.
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
