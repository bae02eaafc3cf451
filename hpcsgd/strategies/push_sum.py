"""The weights of push-sum averaging, which every rank computes for all peers."""

from __future__ import annotations

import numpy as np

from hpcsgd.topology import Topology


class Weights:
    """One weight a peer, 1 at first, of which each step hands shares to the readers.

    Parameters
    ----------
    graph
        Who reads whom at which step.

    Attributes
    ----------
    here, away
        Of each peer, float64: its weight, and what is on its way to it. All add up to the number of peers.
    """

    def __init__(self, graph: Topology) -> None:
        self.here, self.away = np.ones(graph.size), np.zeros(graph.size)
        own = np.eye(graph.size, dtype=bool)
        self._links = [(graph.matrix(step) > 0) | own for step in range(graph.period)]
        self._parts = [links.sum(axis=0) for links in self._links]

    def part(self, peer: int, step: int) -> float:
        """What of a peer goes to each of its readers, and stays with itself, at a step."""
        return 1.0 / float(self._parts[step % len(self._parts)][peer])

    def push(self, step: int) -> None:
        """The weights after a step whose shares arrive at once."""
        self.here = self._arriving(step, self.here)

    def push_with_delay(self, step: int) -> None:
        """The weights after a step whose shares are then on their way, while those of the last arrive."""
        kept = self.here / self._parts[step % len(self._parts)]
        self.here, self.away = kept + self.away, self._arriving(step, self.here) - kept

    def _arriving(self, step: int, weights: np.ndarray) -> np.ndarray:
        # Each sum is divided once: where all have as many readers as sources, 1 remains exactly 1.
        links, parts = self._links[step % len(self._links)], self._parts[step % len(self._parts)]
        arriving = np.zeros(len(weights))
        for number in np.unique(parts):
            arriving += links[:, parts == number] @ weights[parts == number] / number
        return arriving
