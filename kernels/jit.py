"""The one way host kernels are compiled: without the GIL, cached on disk where a disk can be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first call; it runs without the GIL, so two threads really overlap."""
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written: compile in every process.
        compiled = numba.njit(nogil=True)(function)
    return compiled


def cache_of(compiled: Any) -> str:
    """The folder that keeps a compiled function for the next process; "" where there is none."""
    return compiled.stats.cache_path or ""
