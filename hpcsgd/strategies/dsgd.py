"""D-SGD: each peer takes its own step, then averages with its neighbours in a topology."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcsgd.mpi.progress import Work
from hpcsgd.strategies.gossip import Gossip


class DSGD(Gossip):
    """Decentralised SGD: a step of one's own, then the mean over the neighbours of a topology.

    y_i = x_i - lr g_i(x_i), then x_i <- sum_j W_ij y_j, as in D-PSGD (Lian et al., arXiv 1705.09056) with
    the step before the averaging. Momentum and other optimizer state stay local. A peer that has run out
    of batches takes no step but goes on averaging.

    Parameters
    ----------
    topology
        Whom each peer averages with, as NAME or NAME:key=value+key=value of `hpcsgd.topology`, of which
        matrix t mod period is the one of step t. Default "exponential".
    overlap
        Average the models from before the step while forward and backward run, and add the step to the
        result: x_i <- sum_j W_ij x_j - lr g_i(x_i), the order of D-PSGD itself. Costs memory of one more
        model. Default False.
    """

    title = "D-SGD"

    def __init__(self, topology: str = "exponential", overlap: bool = False) -> None:
        super().__init__(topology, overlap)

    def step(self, update: Callable[[], None]) -> None:
        setting = self.setting
        if self.overlap and setting.turn == 0:
            (self._ahead or self._begin(setting.step)).wait()
        if setting.weight:
            update()
        if setting.turn < setting.peers.each - 1:
            return
        if self.overlap:
            self._add_changes()
            self._ahead = self._begin(setting.step + 1)
        else:
            self._begin(setting.step).wait()
        self._exchange.settle()

    def _begin(self, step: int) -> Work:
        return self._submit("averaging with neighbours", step, self._average)

    def _average(self, step: int) -> None:
        """Show the models of this rank's peers, and give each its average, or what the average changes."""
        peers, graph, exchange = self.setting.peers, self.graph, self._exchange
        for peer in peers.local:
            exchange.show(peer, step, graph.readers(peer, step))
        for peer, changes in zip(peers.local, self._brought, strict=True):
            terms = graph.row(peer, step)
            if self.overlap:
                exchange.mix(peer, step, [(p, w - (p == peer)) for p, w in terms], changes)
            else:
                exchange.mix(peer, step, terms)

    def _add_changes(self) -> None:
        for group, changes in zip(self.parameters.groups, self._brought, strict=True):
            for bucket, change in zip(group, changes, strict=True):
                bucket.flat.add_(change.to(bucket.flat.device))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # What was averaged ahead was of the models before.
        self._ahead = None
        self._exchange.clear()
