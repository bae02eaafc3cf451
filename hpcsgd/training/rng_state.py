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
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


def state() -> dict[str, Any]:
    """Return the states of all generators, CUDA included, in types that a checkpoint may hold."""
    kind, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [kind, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
    }


def restore(saved: dict[str, Any]) -> None:
    """Set all generators to the states that `state` returned."""
    torch.set_rng_state(saved["torch"])
    if saved["cuda"]:
        torch.cuda.set_rng_state_all(saved["cuda"])
    kind, numbers, gauss = saved["python"]
    random.setstate((kind, tuple(numbers), gauss))
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
