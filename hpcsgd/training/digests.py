"""Checksums of batches and samples, by which the data of ranks are compared."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEPTH = 8  # of nesting; deeper values count by their types


def digest(value: Any) -> int | None:
    """Return a checksum of a batch; None if it has no content by which it is distinct from others.

    Parameters
    ----------
    value
        Tensors, arrays, numbers and text, also nested in lists, mappings and objects. Numbers, and tensors
        and arrays of one repeated value, are no content.
    """
    parts: list[bytes] = []
    return _checksum(parts) if _collect(value, parts, 0) else None


def sample_digest(value: Any) -> int:
    """Return a checksum of any sample, whatever its content."""
    parts: list[bytes] = []
    _collect(value, parts, 0)
    return _checksum(parts)


def _checksum(parts: list[bytes]) -> int:
    return zlib.crc32(b"\0".join(parts))


def _collect(value: Any, parts: list[bytes], depth: int) -> bool:
    """Append the bytes of a value; return whether it has content."""
    kept = len(parts)
    try:
        return _collect_known(value, parts, depth)
    except Exception:  # a foreign type, whose content cannot be read
        del parts[kept:]
        parts.append(f"{type(value).__qualname__} {getattr(value, 'shape', '')}".encode())
        return False


def _collect_known(value: Any, parts: list[bytes], depth: int) -> bool:
    if isinstance(value, Tensor):
        return _collect_tensor(value.detach(), parts)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _collect_bytes(np.ascontiguousarray(value).reshape(-1).view(np.uint8), value.shape, parts)
    if value is None or isinstance(value, bool | int | float | complex | np.generic):
        parts.append(repr(value).encode())
        return False
    if isinstance(value, str | bytes):
        parts.append(value.encode(errors="surrogatepass") if isinstance(value, str) else value)
        return len(value) > 0
    inside = _inside(value)
    if inside is None:
        parts.append(pickle.dumps(value))
        return True
    parts.append(f"{type(value).__qualname__} of {len(inside)}".encode())
    if depth == _DEPTH:
        return False
    return sum(_collect(each, parts, depth + 1) for each in inside) > 0  # any() stops at the first


def _inside(value: Any) -> list[Any] | None:
    """Return the values inside a container or object; None: it is to be pickled."""
    if isinstance(value, Mapping):
        return [part for item in value.items() for part in item]
    if isinstance(value, list | tuple | np.ndarray):
        return list(value)
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, each.name) for each in fields(value)]
    if type(value).__module__.split(".")[0] not in ("builtins", "PIL") and hasattr(value, "__dict__"):
        return [part for item in vars(value).items() for part in item]
    return None


def _collect_tensor(value: Tensor, parts: list[bytes]) -> bool:
    if value.layout != torch.strided:
        entries = value.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
        parts.append(repr(tuple(value.shape)).encode())
        return _collect_tensor(entries.indices(), parts) | _collect_tensor(entries.values(), parts)
    # As bytes, for NumPy lacks some dtypes.
    data = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    parts.append(str(value.dtype).encode())
    return _collect_bytes(data, value.shape, parts)


def _collect_bytes(data: np.ndarray, shape: Any, parts: list[bytes]) -> bool:
    parts += [repr(tuple(shape)).encode(), zlib.crc32(data.data).to_bytes(4, "big")]
    elements = data.reshape(int(np.prod(shape)) or 1, -1)
    return len(elements) > 1 and bool((elements != elements[0]).any())
