"""Random streams, each a function of a purpose and a key: never the global state of a library."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hpcsgd.errors import BadOption


def numpy_stream(purpose: str, *key: int) -> np.random.Generator:
    """A NumPy generator for one purpose and key of non-negative integers."""
    return np.random.default_rng(_sequence(purpose, key))


def torch_stream(purpose: str, *key: int) -> torch.Generator:
    """A torch generator for one purpose and key of non-negative integers."""
    (seed,) = _sequence(purpose, key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed))


@contextmanager
def python_random_kept() -> Iterator[None]:
    """Put the state of the module ``random`` back at the end: importing some libraries draws."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _sequence(purpose: str, key: tuple[int, ...]) -> np.random.SeedSequence:
    if any(part < 0 for part in key):
        raise BadOption("a seed is negative", expected="0 or more", got=min(key))
    return np.random.SeedSequence([zlib.crc32(purpose.encode()), *key])
