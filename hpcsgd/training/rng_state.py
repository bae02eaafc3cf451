"""The global random generators of Python, NumPy and torch: seeded, saved and restored together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - user models may draw from it
    torch.default_generator.manual_seed(number)  # torch.manual_seed formats stacks, 7 ms without a GPU
    module = _accelerator()
    if module is not None:
        module.manual_seed_all(number)


def state() -> dict[str, Any]:
    """Return the states of all generators, those of GPUs included, in types that a checkpoint may hold."""
    module = _accelerator()
    kind, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": [] if module is None else module.get_rng_state_all(),  # named so also for other GPUs
        "python": [kind, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
    }


def restore(saved: dict[str, Any]) -> None:
    """Set all generators to the states that `state` returned; of GPUs, those that are here too."""
    torch.set_rng_state(saved["torch"])
    module = _accelerator()
    if module is not None:
        module.set_rng_state_all(saved["cuda"][: module.device_count()])
    kind, numbers, gauss = saved["python"]
    random.setstate((kind, tuple(numbers), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _accelerator() -> Any:
    """Return torch's module of the GPUs of this process, of whichever make; None: there are none."""
    accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
    if accelerator is None or not accelerator.is_available():
        return torch.cuda if torch.cuda.is_available() else None
    module = torch.get_device_module(accelerator.current_accelerator())
    return module if hasattr(module, "set_rng_state_all") else None  # Apple's has one generator, for one GPU
