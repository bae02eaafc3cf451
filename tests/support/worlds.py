"""Worlds shared by all tests of a session."""

from __future__ import annotations

from typing import Any

import pytest


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
                self._worlds[per_node, shared] = World(timeout=40)
        return self._worlds[per_node, shared]

    def discard(self) -> None:
        """Discard all worlds: after a failed test, communication of unknown state may be in flight."""
        self._worlds.clear()


worlds = Worlds()
