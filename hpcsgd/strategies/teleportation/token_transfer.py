"""Moves of models between peers: each that receives takes on a weighted sum of what others had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcsgd.collectives.neighbour_exchange import Exchange, Terms


@dataclass
class Move:
    """Tokens go from the peers that hold them to others, or the same, and are averaged on the way.

    Attributes
    ----------
    exchange, version
        What moves, and its number there.
    sources, targets
        The peer of each token before and after.
    rows
        For each token the (token, weight) pairs that it becomes the sum of.
    """

    exchange: Exchange
    version: int
    sources: Sequence[int]
    targets: Sequence[int]
    rows: Sequence[Terms]

    def run(self) -> None:
        """Do this rank's part: as a job, as all of `Exchange`."""
        local = self.exchange.peers.local
        for token, peer in enumerate(self.sources):
            if peer in local:
                self._show(token, peer)
        for token, peer in enumerate(self.targets):
            if peer in local:
                self._mix(token, peer)

    def _show(self, token: int, peer: int) -> None:
        reading = [m for m, row in enumerate(self.rows) if any(source == token for source, _ in row)]
        readers = [self.targets[m] for m in reading if self.targets[m] != peer]
        self.exchange.show(peer, self.version, readers)

    def _mix(self, token: int, peer: int) -> None:
        terms = [(self.sources[source], weight) for source, weight in self.rows[token]]
        if terms != [(peer, 1.0)]:
            self.exchange.mix(peer, self.version, terms)
