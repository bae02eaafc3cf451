"""Compilation of host kernels: without the GIL, cached on disk where a folder is writable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config

if not config.CACHE_DIR:  # type: ignore[attr-defined]
    # Not in the package: pip would leave the folder behind, which hides a later editable installation.
    _folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    config.CACHE_DIR = str(_folder / "hpcsgd")  # type: ignore[attr-defined]


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
