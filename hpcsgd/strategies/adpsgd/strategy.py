"""AD-PSGD: peers average in pairs with random neighbours, without waiting for slower peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hpcsgd.strategies.adpsgd.async_pairs import PairwiseAverager
from hpcsgd.strategies.adpsgd.pairing import BipartitePairs, SynchronousPairs
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.replicas import ReplicaStrategy
from hpcsgd.tensors.parameters import Parameters
from hpcsgd.topology import TopologySpec, build

_NO_TARGET = 2**62


@dataclass(eq=False, repr=False)
class ADPSGD(ReplicaStrategy):
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
        self.deterministic = self.synchronous or context.peers.size == 1
        make = SynchronousPairs if self.synchronous else AsynchronousPairs
        self._pairs: SynchronousPairs | AsynchronousPairs = make(context, self.parameters, pairs)

    def detach(self) -> None:
        self._pairs.close()
        del self._pairs
        super().detach()

    def disconnect(self) -> None:
        super().disconnect()
        if isinstance(pairs := getattr(self, "_pairs", None), AsynchronousPairs):
            pairs.abandon()

    def peer_schedule(self, end: int) -> Iterator[int]:
        assert isinstance(self._pairs, AsynchronousPairs)
        return self._pairs.peer_schedule(end)

    def step(self, update: Callable[[], None]) -> None:
        self._pairs.step(update)

    def quiesce(self) -> None:
        self._pairs.quiesce()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; with the schedule "free" only while quiescent."""
        return self._pairs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pairs.load_state_dict(state)


class AsynchronousPairs:
    """Schedule "free": an active peer averages whenever it has taken a step and has no request in flight.

    Parameters
    ----------
    context
        The context of the strategy.
    parameters
        The model of this rank.
    pairs
        The graph: neighbours and active peers.
    """

    def __init__(self, context: StrategyContext, parameters: Parameters, pairs: BipartitePairs) -> None:
        rank = context.world.rank
        self._context, self._end = context, _NO_TARGET
        self._is_free = False  # whether steps were taken outside of a loop, of which others may not know yet
        self._averager = PairwiseAverager(
            context.world,
            parameters.group,
            pairs.neighbours[rank],
            active=rank in pairs.active,
            seed=context.seed,
        )

    def peer_schedule(self, end: int) -> Iterator[int]:
        self._end = end
        while self._averager.steps < end * self._context.peers.size:
            yield 0
        with self._context.world.calls.ending():
            self._averager.finish()
            self._averager.quiesce()
        self._context.step, self._end = end, _NO_TARGET

    def step(self, update: Callable[[], None]) -> None:
        update()
        self._averager.end_step()
        self._count_steps()
        self._is_free |= self._end == _NO_TARGET

    def _count_steps(self) -> None:
        self._context.step = min(self._averager.steps // self._context.peers.size, self._end)

    def quiesce(self) -> None:
        self._averager.quiesce()
        if self._is_free:
            self._count_steps()
            self._is_free = False

    def state_dict(self) -> dict[str, Any]:
        return {"steps": torch.from_numpy(self._averager.counts.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averager.reset(state["steps"].tolist())

    def close(self) -> None:
        self._averager.close()

    def abandon(self) -> None:
        self._averager.abandon()
