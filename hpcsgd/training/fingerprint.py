"""Fingerprints of data sets: whether ranks have the same one, as far as a few samples show."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from hpcsgd.training import rng_state
from hpcsgd.training.digests import sample_digest

_DEPTH = 8  # of data sets in data sets


def fingerprint(dataset: Any) -> int | None:
    """Return a checksum of a data set's type, length, indices of subsets, and some samples.

    Parameters
    ----------
    dataset
        A data set with `len()` and samples by index. Samples are fetched with equally seeded global random
        generators, which are restored; those that differ all the same between two fetches count by their
        type.

    Returns
    -------
    int or None
        None if samples cannot be fetched.
    """
    parts = [f"{type(dataset).__qualname__} {len(dataset)}"]
    inner = dataset
    while isinstance(inner, Subset):
        parts.append(_indices(inner.indices))
        inner = inner.dataset
    generators = rng_state.state()
    try:
        parts += [_sample(dataset, index) for index in _positions(len(dataset))]
    except Exception:
        return None
    finally:
        rng_state.restore(generators)
    return zlib.crc32(" ".join(parts).encode())


def _positions(length: int) -> list[int]:
    return sorted({(length - 1) * part // 4 for part in range(5)}) if length else []


def _sample(dataset: Any, index: int) -> str:
    digests = set()
    for _ in range(2):
        rng_state.seed(index)
        value = _copied(dataset)[index]
        digests.add(sample_digest(value))
    return str(digests.pop()) if len(digests) == 1 else type(value).__qualname__


def _copied(dataset: Any, depth: int = 0) -> Any:
    """Copy a data set, but not its data: files that it opens with its first sample stay closed in it.

    Such files must be opened by each of a loader's processes.
    """
    if not isinstance(dataset, Dataset) or not hasattr(dataset, "__dict__") or depth == _DEPTH:
        return dataset
    copied = copy.copy(dataset)
    for name, value in vars(dataset).items():
        if isinstance(value, Dataset):
            vars(copied)[name] = _copied(value, depth + 1)
        elif isinstance(value, list) and value and isinstance(value[0], Dataset):
            vars(copied)[name] = [_copied(each, depth + 1) for each in value]
    return copied


def _indices(indices: Any) -> str:
    if isinstance(indices, range):
        return repr(indices)
    return str(zlib.crc32(np.ascontiguousarray(indices).tobytes()))
