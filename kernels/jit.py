"""Compilation of host kernels: without the GIL, cached on disk where a folder is writable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on its first call; it releases the GIL, so calls in two threads overlap."""
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written: compile in every process.
        compiled = numba.njit(nogil=True)(function)
    return compiled


def cache_folder(compiled: Any) -> str:
    """Return the folder that holds the compiled function for later processes; "" if there is none."""
    return compiled.stats.cache_path or ""
