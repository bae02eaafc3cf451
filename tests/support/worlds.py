"""Worlds that the tests share."""

from __future__ import annotations

from typing import Any

import pytest


class Worlds:
    """Worlds on all ranks, one a layout, made when a test first asks, kept while tests pass."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, bool], Any] = {}

    def get(self, per_node: int = 0, shared: bool = True) -> Any:
        from hpcsgd import World

        if (per_node, shared) not in self._made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HPCSGD_RANKS_PER_NODE", str(per_node))
                patch.setenv("HPCSGD_SHARED_MEMORY", str(int(shared)))
                world = self._made[per_node, shared] = World(timeout=40)
            if not shared:
                world.window = lambda nbytes: None
        return self._made[per_node, shared]

    def forget(self) -> None:
        """After a failure nobody knows what is in flight."""
        self._made.clear()


worlds = Worlds()
