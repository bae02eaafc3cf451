"""Weights of push-sum averaging; every rank computes those of all peers, so no message carries them."""

from __future__ import annotations

import numpy as np

from hpcsgd.topology import Topology


class PushSumWeights:
    """One weight a peer, initially 1, that each step splits evenly over the peer and its readers.

    Parameters
    ----------
    graph
        The topology: its readers of a peer at a step are the receivers of the peer's shares.

    Attributes
    ----------
    local, in_flight
        float64 of shape (peers,): each peer's weight, and the shares that have been sent to it but not
        merged. They sum to the number of peers.
    """

    def __init__(self, graph: Topology) -> None:
        self.local, self.in_flight = np.ones(graph.size), np.zeros(graph.size)
        self_loops = np.eye(graph.size, dtype=bool)
        self._edges = [(graph.matrix(step) > 0) | self_loops for step in range(graph.period)]
        self._receivers = [edges.sum(axis=0) for edges in self._edges]

    def share(self, peer: int, step: int) -> float:
        """Return the share of a peer that each of its readers gets, and that it retains, at a step."""
        return 1.0 / float(self._receivers[step % len(self._receivers)][peer])

    def push(self, step: int) -> None:
        """Advance the weights by a step whose shares are merged within it."""
        self.local = self._arriving(step, self.local)

    def push_with_delay(self, step: int) -> None:
        """Advance the weights by a step that sends shares and merges those of the step before."""
        retained = self.local / self._receivers[step % len(self._receivers)]
        self.local, self.in_flight = retained + self.in_flight, self._arriving(step, self.local) - retained

    def _arriving(self, step: int, weights: np.ndarray) -> np.ndarray:
        # Each sum is divided once: if all have as many readers as sources, 1 remains exactly 1.
        number = step % len(self._edges)
        edges, receivers = self._edges[number], self._receivers[number]
        arriving = np.zeros(len(weights))
        for count in np.unique(receivers):
            arriving += edges[:, receivers == count] @ weights[receivers == count] / count
        return arriving
