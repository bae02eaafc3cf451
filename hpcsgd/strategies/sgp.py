"""SGP: stochastic gradient push, where each peer sends shares of its model over directed edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hpcsgd.mpi.tasks import Steps
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.gossip import Gossip
from hpcsgd.strategies.push_sum import PushSumWeights
from hpcsgd.tensors.weighted_sum import weighted_sum
from hpcsgd.topology import TopologySpec


@dataclass(eq=False, repr=False)
class SGP(Gossip):
    """Stochastic gradient push: push-sum averaging over directed edges (Assran et al., arXiv 1811.10792).

    Peer j has a numerator x_j and a weight w_j, initially 1; its model is z_j = x_j / w_j. At step t it
    takes its step on z_j, adds the change to x_j, and splits x_j and w_j evenly over itself and its
    readers in the topology: x_i <- sum_j P_ij x_j with P_ij = 1 / (1 + readers of j), and w likewise.
    P need only be column-stochastic, so any directed topology does; the weights, with those in flight,
    sum to the number of peers at every step. Optimizer state stays local. A peer that has run out of
    batches takes no step but continues to push.

    Our reading: every rank computes all weights from the topology, so no message carries them; the
    consensus is sum_i w_i z_i / sum_i w_i, without the shares in flight.

    Parameters
    ----------
    topology
        NAME or NAME:key=value+key=value of `hpcsgd.topology`; the edges of step t are those of its matrix
        t mod period. Default "one-peer-exponential".
    overlap
        Shares that are sent after step t are merged at the end of step t + 1, while forward and backward
        run in between (the paper's overlap with a delay of one step). Takes the memory of one more model,
        and of another one during the step. Default False.
    """

    title = "SGP"

    topology: TopologySpec = "one-peer-exponential"

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        self._weights = PushSumWeights(self.graph)
        #: The step whose shares are in flight.
        self._sent: int | None = None

    def consensus_weight(self, peer: int) -> float:
        return float(self._weights.local[peer] / self._weights.local.sum())

    def step(self, update: Callable[[], None]) -> None:
        context = self.context
        self._change_numerator(update)
        if context.current_peer_index < context.peers.per_rank - 1:
            return
        if self.overlap:
            self._merge_and_push(context.step)
        else:
            self._weights.push(context.step)
            self._submit("push to neighbours", context.step, self._push).wait()
        self._exchange.flush()

    def _change_numerator(self, update: Callable[[], None]) -> None:
        """Replace z by x, with the change of z by the update added."""
        weight = float(self._weights.local[self.context.peer])
        before = self.parameters.copy() if weight != 1 else []
        if self.context.weight:
            update()
        for bucket, value in zip(self.parameters.group, before, strict=False):
            bucket.flat.add_(value, alpha=weight - 1)

    def _push(self, step: int) -> Steps[None]:
        """Replace every local x by the next z; the weights are those after the step already."""
        yield from self._publish(step)
        for peer in self.context.peers.local:
            weight = float(self._weights.local[peer])
            sources = sorted([peer, *self.graph.sources(peer, step)])
            terms = [(source, self._weights.share(source, step) / weight) for source in sources]
            yield from self._exchange.mix(peer, step, terms)

    def _merge_and_push(self, step: int) -> None:
        """Replace every local x by the next z, with the shares of the last step; send the next shares."""
        if self._exchange_in_flight is not None:
            self._exchange_in_flight.wait()
        self._submit("push to neighbours", step, self._publish).wait()
        self._weights.push_with_delay(step)
        for index, peer in enumerate(self.context.peers.local):
            weight, retained = float(self._weights.local[peer]), self._weights.share(peer, step)
            has_shares = self._sent is not None and self.graph.sources(peer, self._sent)
            for bucket, shares in zip(self.parameters.groups[index], self._received[index], strict=True):
                terms = [(bucket.flat, retained / weight)]
                if has_shares:
                    terms.append((shares.to(bucket.flat.device), 1 / weight))
                weighted_sum(bucket.flat, terms)
        self._exchange_in_flight, self._sent = self._submit("shares of neighbours", step, self._receive), step

    def _publish(self, step: int) -> Steps[None]:
        for peer in self.context.peers.local:
            yield from self._exchange.publish(peer, step, self.graph.readers(peer, step))

    def _receive(self, step: int) -> Steps[None]:
        for peer, shares in zip(self.context.peers.local, self._received, strict=True):
            terms = [(source, self._weights.share(source, step)) for source in self.graph.sources(peer, step)]
            if terms:
                yield from self._exchange.mix(peer, step, terms, shares)

    def state_dict(self) -> dict[str, Any]:
        if self._exchange_in_flight is not None:
            self._exchange_in_flight.wait()
        return {
            "weights": torch.from_numpy(self._weights.local.copy()),
            "weights_on_the_way": torch.from_numpy(self._weights.in_flight.copy()),
            "sent": self._sent,
            "on_the_way": [[part.cpu().clone() for part in shares] for shares in self._received],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exchange_in_flight, self._sent = None, state["sent"]
        self._weights.local[:], self._weights.in_flight[:] = state["weights"], state["weights_on_the_way"]
        for shares, saved in zip(self._received, state["on_the_way"], strict=True):
            for part, value in zip(shares, saved, strict=True):
                part.copy_(value)
        self._exchange.reset()
