"""SGP: stochastic gradient push, where each peer sends shares of its model along directed links."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.gossip import Gossip
from hpcsgd.strategies.push_sum import Weights
from hpcsgd.tensors.weighted_sum import combine


class SGP(Gossip):
    """Stochastic gradient push: push-sum averaging of the models (Assran et al., arXiv 1811.10792).

    Peer j has a numerator x_j and a weight w_j, 1 at first; its model is z_j = x_j / w_j. At step t it
    takes its step on z_j, adds to x_j what that changed, and splits x_j and w_j evenly over itself and
    its readers in the topology: x_i <- sum_j P_ij x_j with P_ij = 1 / (1 + readers of j), and w likewise.
    P need only be column-stochastic, so any directed topology does; the weights add up to the number of
    peers at every step, together with those on their way. Optimizer state stays local. A peer that has
    run out of batches takes no step but goes on pushing.

    Our reading: every rank computes all weights by itself, as the topology tells them, so no message
    carries them; the consensus is sum_i w_i z_i / sum_i w_i, without what is on its way.

    Parameters
    ----------
    topology
        Whom each peer pushes to, as NAME or NAME:key=value+key=value of `hpcsgd.topology`, of which
        matrix t mod period says who reads whom at step t. Default "one-peer-exponential".
    overlap
        Shares that are sent after step t arrive at the end of step t + 1, while forward and backward run
        in between (the paper's overlap with a delay of one step). Costs memory of one more model, and of
        another one during the step. Default False.
    """

    title = "SGP"

    def __init__(self, topology: str = "one-peer-exponential", overlap: bool = False) -> None:
        super().__init__(topology, overlap)

    def attach(self, setting: Setting) -> None:
        super().attach(setting)
        self._weights = Weights(self.graph)
        #: The step whose shares are on their way.
        self._sent: int | None = None

    def share(self, peer: int) -> float:
        return float(self._weights.here[peer] / self._weights.here.sum())

    def step(self, update: Callable[[], None]) -> None:
        setting = self.setting
        self._change_numerator(update)
        if setting.turn < setting.peers.each - 1:
            return
        if self.overlap:
            self._take_and_push(setting.step)
        else:
            self._weights.push(setting.step)
            self._submit("push to neighbours", setting.step, self._push).wait()
        self._exchange.settle()

    def _change_numerator(self, update: Callable[[], None]) -> None:
        """From z to x, to which is added what the update changes in z."""
        weight = float(self._weights.here[self.setting.peer])
        before = self.parameters.copy() if weight != 1 else []
        if self.setting.weight:
            update()
        for bucket, value in zip(self.parameters.group, before, strict=False):
            bucket.flat.add_(value, alpha=weight - 1)

    def _push(self, step: int) -> None:
        """From every x to the next z; the weights are the next ones already."""
        self._show(step)
        for peer in self.setting.peers.local:
            weight = float(self._weights.here[peer])
            sources = sorted([peer, *self.graph.sources(peer, step)])
            terms = [(source, self._weights.part(source, step) / weight) for source in sources]
            self._exchange.mix(peer, step, terms)

    def _take_and_push(self, step: int) -> None:
        """From every x, and what was sent to it a step ago, to the next z; send the next shares."""
        if self._ahead is not None:
            self._ahead.wait()
        self._submit("push to neighbours", step, self._show).wait()
        self._weights.push_with_delay(step)
        for index, peer in enumerate(self.setting.peers.local):
            weight, kept = float(self._weights.here[peer]), self._weights.part(peer, step)
            arrives = self._sent is not None and self.graph.sources(peer, self._sent)
            for bucket, share in zip(self.parameters.groups[index], self._brought[index], strict=True):
                terms = [(bucket.flat, kept / weight)]
                if arrives:
                    terms.append((share.to(bucket.flat.device), 1 / weight))
                combine(bucket.flat, terms)
        self._ahead, self._sent = self._submit("shares of neighbours", step, self._receive), step

    def _show(self, step: int) -> None:
        for peer in self.setting.peers.local:
            self._exchange.show(peer, step, self.graph.readers(peer, step))

    def _receive(self, step: int) -> None:
        for peer, brought in zip(self.setting.peers.local, self._brought, strict=True):
            terms = [(source, self._weights.part(source, step)) for source in self.graph.sources(peer, step)]
            if terms:
                self._exchange.mix(peer, step, terms, brought)

    def state_dict(self) -> dict[str, Any]:
        if self._ahead is not None:
            self._ahead.wait()
        return {
            "weights": torch.from_numpy(self._weights.here.copy()),
            "weights_on_the_way": torch.from_numpy(self._weights.away.copy()),
            "sent": self._sent,
            "on_the_way": [[part.clone() for part in brought] for brought in self._brought],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ahead, self._sent = None, state["sent"]
        self._weights.here[:], self._weights.away[:] = state["weights"], state["weights_on_the_way"]
        for brought, saved in zip(self._brought, state["on_the_way"], strict=True):
            for part, value in zip(brought, saved, strict=True):
                part.copy_(value)
        self._exchange.clear()
