"""`Gossip`: base class of the synchronous methods whose peers exchange models with their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.mpi.tasks import Steps
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.replicas import ReplicaStrategy
from hpcsgd.strategies.step_work import StepWork
from hpcsgd.topology import TopologySpec, build


@dataclass(eq=False, repr=False)
class Gossip(ReplicaStrategy):
    """A synchronous method in which every peer takes a step and then exchanges models in a topology.

    Parameters
    ----------
    topology
        NAME or NAME:key=value+key=value of `hpcsgd.topology`; step t uses its matrix t mod period.
    overlap
        Exchange models while forward and backward run. Takes the memory of one more model.

    Attributes
    ----------
    graph
        The topology over the peers of the run.
    """

    accepts_virtual_nodes = True

    topology: TopologySpec
    overlap: bool = False

    def attach(self, context: StrategyContext) -> None:
        self.graph = context.world.collectively(lambda: build(self.topology, context.peers.size))
        super().attach(context)
        self._exchange = Exchange(context.peers, self.parameters.groups)
        #: For each local peer the result of the exchange that was started after the last step.
        self._received = [
            [torch.empty_like(bucket.flat, device=self._exchange.device) for bucket in group]
            if self.overlap
            else []
            for group in self.parameters.groups
        ]
        self._exchange_in_flight: StepWork | None = None

    def detach(self) -> None:
        del self._exchange, self._exchange_in_flight
        super().detach()

    def _submit(self, what: str, step: int, job: Callable[[int], Steps[None]]) -> StepWork:
        """Execute the steps of `job(step)` in the communication thread."""
        return StepWork(self.context.world, f"{what} at step {step}", lambda: job(step))
