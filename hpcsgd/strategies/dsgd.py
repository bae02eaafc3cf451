"""D-SGD: decentralised SGD, a local step and then the weighted average over the neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpcsgd.mpi.tasks import Steps
from hpcsgd.strategies.gossip import Gossip
from hpcsgd.strategies.step_work import StepWork
from hpcsgd.topology import TopologySpec


@dataclass(eq=False, repr=False)
class DSGD(Gossip):
    """Decentralised SGD: a local step, then the weighted average with the neighbours in a topology.

    y_i = x_i - lr g_i(x_i), then x_i <- sum_j W_ij y_j, as in D-PSGD (Lian et al., arXiv 1705.09056) with
    the step before the averaging. Momentum and other optimizer state stay local. A peer that has run out
    of batches takes no step but continues to average.

    Parameters
    ----------
    topology
        NAME or NAME:key=value+key=value of `hpcsgd.topology`; W of step t is its matrix t mod period.
        Default "exponential".
    overlap
        Average the models from before the step while forward and backward run, and add the step to the
        result: x_i <- sum_j W_ij x_j - lr g_i(x_i), the order of D-PSGD itself. Takes the memory of one
        more model. Default False.
    """

    title = "D-SGD"

    topology: TopologySpec = "exponential"

    def step(self, update: Callable[[], None]) -> None:
        context = self.context
        if self.overlap and context.current_peer_index == 0:
            (self._exchange_in_flight or self._begin(context.step)).wait()
        if context.weight:
            update()
        if context.current_peer_index < context.peers.per_rank - 1:
            return
        if self.overlap:
            self._add_changes()
            self._exchange_in_flight = self._begin(context.step + 1)
        else:
            self._begin(context.step).wait()
        self._exchange.flush()

    def _begin(self, step: int) -> StepWork:
        return self._submit("averaging with neighbours", step, self._average)

    def _average(self, step: int) -> Steps[None]:
        """Publish the local models, then average each in place, or with overlap write average - model."""
        peers, graph, exchange = self.context.peers, self.graph, self._exchange
        for peer in peers.local:
            yield from exchange.publish(peer, step, graph.readers(peer, step))
        for peer, changes in zip(peers.local, self._received, strict=True):
            terms = graph.row(peer, step)
            if self.overlap:
                yield from exchange.mix(peer, step, [(p, w - (p == peer)) for p, w in terms], changes)
            else:
                yield from exchange.mix(peer, step, terms)

    def _add_changes(self) -> None:
        for group, changes in zip(self.parameters.groups, self._received, strict=True):
            for bucket, change in zip(group, changes, strict=True):
                bucket.flat.add_(change.to(bucket.flat.device))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The averages in flight are of the models that have just been replaced.
        self._exchange_in_flight = None
        self._exchange.reset()
