"""AD-PSGD: peers average in pairs with random neighbours, without waiting for slower peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hpcsgd.strategies.adpsgd.async_pairs import PairwiseAverager
from hpcsgd.strategies.adpsgd.pairing import BipartitePairs, SynchronousPairs
from hpcsgd.strategies.asynchronous import AsynchronousStrategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.topology import TopologySpec, build


@dataclass(eq=False, repr=False)
class ADPSGD(AsynchronousStrategy):
    """Asynchronous decentralised SGD by averages of random pairs (Lian et al., arXiv 1710.06952).

    The graph is bipartite; peers of the active half request averages, peers of the passive half reply, so no
    cycle of waits can form. Optimizer state stays local. From the paper: the two halves, the average of two
    models with a random neighbour, gradients computed on a model from before an average. The rest is our
    reading:

    "free": no gradient step ever waits. An active peer sends one request a step to a random neighbour, unless
    its last one is still in flight. Averages are of replicas; the correction of a replica is added to the
    model at the end of a step, so forward and backward read no half-written model and the gradients of a
    peer delay no average. Iterations are the steps of all peers, as of the last message, divided by the
    number of peers; a rank may take more steps than another, or none. Takes the memory of four more models,
    on the host.

    "drawn": every peer takes every step. At the same time each active peer, in a random order that is equal
    on all ranks, averages with one random neighbour; the step is then added: x <- average + step. Has the
    same bits at each run, and with virtual nodes. Takes the memory of one more model.

    Parameters
    ----------
    topology
        A bipartite graph, as NAME or NAME:key=value+key=value of `hpcsgd.topology`: "ring" of an even number
        of peers (default), "hypercube", "star", "file".
    schedule
        "free" (default) or "drawn".

    Raises
    ------
    BadOption
        On attachment, a graph that is not bipartite.
    """

    title = "AD-PSGD"

    topology: TopologySpec = "ring"
    schedule: Literal["free", "drawn"] = "free"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.synchronous = self.accepts_virtual_nodes = self.schedule == "drawn"
        self.averages_in_background = not self.synchronous
        if not self.synchronous:
            self.title = "AD-PSGD without schedule=drawn"

    def attach(self, context: StrategyContext) -> None:
        pairs = BipartitePairs(context.world.collectively(lambda: build(self.topology, context.peers.size)))
        super().attach(context)
        self._pairs: SynchronousPairs | PairwiseAverager
        if self.synchronous:
            self._pairs = SynchronousPairs(context, self.parameters, pairs)
        else:
            rank = context.world.rank
            self._pairs = PairwiseAverager(
                context.world,
                self.parameters.group,
                pairs.neighbours[rank],
                active=rank in pairs.active,
                seed=context.seed,
            )

    def detach(self) -> None:
        self._pairs.close()
        del self._pairs
        super().detach()

    def disconnect(self) -> None:
        super().disconnect()
        if hasattr(self, "_pairs"):
            self._pairs.abandon()

    def take_step(self, update: Callable[[], None]) -> None:
        self._pairs.step(update)

    def total_steps(self) -> int:
        return self._pairs.total_steps()

    def finish(self) -> None:
        self._pairs.finish()

    def settle(self) -> None:
        self._pairs.quiesce()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; with the schedule "free" only while quiescent."""
        return self._pairs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pairs.load_state_dict(state)
