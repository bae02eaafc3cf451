"""Optimizers by name, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

#: Names of `--optimizer`; the options are those of torch's classes.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_STEP_AT = (0.5, 0.75)
_STEP_FACTOR = 0.1


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
