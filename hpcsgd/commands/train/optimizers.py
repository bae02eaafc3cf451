"""Optimizers by name, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

#: What `--optimizer` knows; options are those of torch's classes.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_STEP_AT = (0.5, 0.75)
_STEP_FACTOR = 0.1


def course(schedule: str, warmup: int, total: int) -> Callable[[int], float]:
    """The factor of the learning rate at each step.

    Parameters
    ----------
    schedule
        "constant"; "cosine" (to 0 at the end); or "step" (a tenth after half of the steps, and again
        after three quarters).
    warmup
        Steps of linear rise before that.
    total
        Steps of the run.
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
