"""Messages above the largest count of MPI, in parts: a count is a C int, and Open MPI has no other calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

#: Bytes of the largest single message; MPI's own limit is 2**31 - 1 elements.
LARGEST = 2**30


class Parts:
    """The requests of a message in parts, with the methods of an MPI request that hpcsgd calls."""

    def __init__(self, requests: list[Any]) -> None:
        self._requests = requests

    def Test(self) -> bool:
        """Return whether all parts are complete."""
        self._requests = [request for request in self._requests if not request.Test()]
        return not self._requests

    def Cancel(self) -> None:
        """Cancel the parts that are not complete."""
        for request in filter(None, self._requests):
            request.Cancel()

    def __bool__(self) -> bool:
        return any(map(bool, self._requests))


def begin(start: Callable[[Any], Any], buffer: Any) -> Any:
    """Return the request of `start(buffer)`, or of one call for each part of a larger buffer.

    All ranks of the operation must have equally large buffers of one dtype: they then make the same parts.
    """
    if buffer.nbytes <= LARGEST:
        return start(as_bytes(buffer))
    return Parts([start(as_bytes(part)) for part in parts(buffer)])


def parts(buffer: Any) -> list[Any]:
    """Return consecutive 1-D parts of a contiguous array or tensor, each of at most `LARGEST` bytes."""
    flat = buffer.reshape(-1)
    count = max(1, LARGEST // buffer.itemsize)
    return [flat[first : first + count] for first in range(0, len(flat), count)] or [flat]


def as_bytes(buffer: Any) -> Any:
    """Return a host array as bytes, for MPI has no type for some dtypes (bfloat16)."""
    return buffer.view(np.uint8) if isinstance(buffer, np.ndarray) else buffer
