"""Random streams, each a function of a purpose and a key, independent of any global state."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hpcsgd.errors import BadOption


def numpy_stream(purpose: str, *key: int) -> np.random.Generator:
    """Return the NumPy generator of a purpose and a key of non-negative integers."""
    return np.random.default_rng(_sequence(purpose, key))


def torch_stream(purpose: str, *key: int) -> torch.Generator:
    """Return the torch generator of a purpose and a key of non-negative integers."""
    (seed,) = _sequence(purpose, key).generate_state(1, np.uint64)
    return torch.Generator(device="cpu").manual_seed(int(seed))


@contextmanager
def preserve_python_random() -> Iterator[None]:
    """Restore the state of the module ``random`` at the end; the import of some libraries changes it."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _sequence(purpose: str, key: tuple[int, ...]) -> np.random.SeedSequence:
    if any(part < 0 for part in key):
        raise BadOption("a seed is negative", expected="0 or more", got=min(key))
    return np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])
