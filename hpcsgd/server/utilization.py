"""How much a server has to do."""

from __future__ import annotations

import time


class Load:
    """Counts what a server finds when it looks at its links, and how long it takes over it."""

    def __init__(self) -> None:
        self._forget()

    def looked(self, found: int, seconds: float) -> None:
        """It has looked at its links and `found` had something, which took so long."""
        self._busy += seconds
        if found:
            self._looks += 1
            self._found += found

    def figures(self) -> dict[str, float]:
        """Since the last call.

        Returns
        -------
        dict
            `queue`: how many links had something, in the mean over the looks at which one had; `load`: the
            share of the time in which the server was at work.
        """
        seconds = max(time.perf_counter() - self._since, 1e-9)
        figures = {"queue": self._found / max(1, self._looks), "load": min(1.0, self._busy / seconds)}
        self._forget()
        return figures

    def _forget(self) -> None:
        self._since = time.perf_counter()
        self._busy = 0.0
        self._looks = self._found = 0
