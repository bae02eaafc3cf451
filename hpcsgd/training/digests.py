"""Digests of batches and samples, by which ranks find out whether they have the same data."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def digest(value: Any, *, distinctive: bool = True) -> int | None:
    """Return a checksum of a batch or sample; None if there is nothing by which it can be compared.

    Parameters
    ----------
    value
        Tensors, arrays, numbers and text, also nested in lists, mappings and data classes.
    distinctive
        Whether there must be text, or a tensor or array with several values. Default True.
    """
    parts: list[bytes] = []
    try:
        has_content = _collect(value, parts)
    except Exception:
        return None
    return zlib.crc32(b"\0".join(parts)) if has_content or not distinctive else None


def _collect(value: Any, parts: list[bytes]) -> bool:
    """Append the bytes of a value; return whether it has content."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        # As bytes, for NumPy lacks some dtypes.
        return _collect_bytes(
            dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value.shape, parts
        )
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _collect_bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8), value.shape, parts)
    if isinstance(value, Mapping):
        return sum(_collect(value[key], parts) for key in value) > 0  # not any(), which stops at the first
    if isinstance(value, list | tuple | np.ndarray):
        return sum(_collect(each, parts) for each in value) > 0  # not any(), which stops at the first
    if is_dataclass(value) and not isinstance(value, type):
        return (
            sum(_collect(getattr(value, each.name), parts) for each in fields(value)) > 0
        )  # not any(), which stops at the first
    if value is None or isinstance(value, bool | int | float | complex):
        parts.append(repr(value).encode())
        return False
    parts.append(value.encode() if isinstance(value, str) else pickle.dumps(value))
    return True


def _collect_bytes(data: np.ndarray, shape: Any, parts: list[bytes]) -> bool:
    parts += [repr(tuple(shape)).encode(), zlib.crc32(data.data).to_bytes(4, "big")]
    elements = data.reshape(int(np.prod(shape)) or 1, -1)
    return len(elements) > 1 and bool((elements != elements[0]).any())
