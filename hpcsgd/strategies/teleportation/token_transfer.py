"""Transfers of models between peers, in which each receiver takes on a weighted sum of the sent models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcsgd.collectives.neighbour_exchange import Exchange, Terms
from hpcsgd.mpi.tasks import Steps


@dataclass
class TokenTransfer:
    """Transfer of all tokens from their holders to other peers, or the same ones, with averaging."""

    #: The exchange of the transferred tensors, and the version that is published there.
    exchange: Exchange
    version: int
    #: The holder of each token before and after.
    sources: Sequence[int]
    targets: Sequence[int]
    rows: Sequence[Terms]  # for each token the (token, weight) pairs of its weighted sum

    def run(self) -> Steps[None]:
        """Publish and mix the tokens of this rank."""
        local = self.exchange.peers.local
        for token, peer in enumerate(self.sources):
            if peer in local:
                yield from self._publish(token, peer)
        for token, peer in enumerate(self.targets):
            if peer in local:
                yield from self._mix(token, peer)

    def _publish(self, token: int, peer: int) -> Steps[None]:
        readers = [m for m, row in enumerate(self.rows) if any(source == token for source, _ in row)]
        others = [self.targets[m] for m in readers if self.targets[m] != peer]
        yield from self.exchange.publish(peer, self.version, others)

    def _mix(self, token: int, peer: int) -> Steps[None]:
        terms = [(self.sources[source], weight) for source, weight in self.rows[token]]
        if terms != [(peer, 1.0)]:
            yield from self.exchange.mix(peer, self.version, terms)
