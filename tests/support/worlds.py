"""Worlds shared by all tests of a session."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch


class Worlds:
    """Worlds of all ranks, one a layout, created at first use and reused while tests pass."""

    def __init__(self) -> None:
        self._worlds: dict[tuple[int, bool], Any] = {}

    def get(self, per_node: int = 0, shared: bool = True) -> Any:
        from hpcsgd import World

        if (per_node, shared) not in self._worlds:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HPCSGD_RANKS_PER_NODE", str(per_node))
                patch.setenv("HPCSGD_SHARED_MEMORY", str(int(shared)))
                self._worlds[per_node, shared] = World(timeout=40, device=str(torch.get_default_device()))
        return self._worlds[per_node, shared]

    def has_open_run(self) -> bool:
        """Return whether a test has left a run that is never collected: a hook of its model refers to it.

        Beside an open run of a world the next one would get a world of its own.
        """
        from hpcsgd.training.lifetime import has_open_run

        def has_run() -> bool:
            return any(map(has_open_run, self._worlds.values()))

        if has_run():
            gc.collect()
        return has_run()

    def discard(self) -> None:
        """Discard all worlds: after a failed test, communication of unknown state may be in flight."""
        self._worlds.clear()


worlds = Worlds()
