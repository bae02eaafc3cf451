"""`ReplicaStrategy`: base class of the methods in which every peer has a model of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from hpcsgd.collectives import allreduce
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.parameters import Parameters
from hpcsgd.tensors.weighted_sum import weighted_sum


class ReplicaStrategy(Strategy):
    """A method with one model a peer, each in a tensor group; the consensus is their weighted mean.

    Attributes
    ----------
    parameters
        The models of the local peers.
    """

    parameters: Parameters

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        peers = context.peers
        self.parameters = Parameters(
            context.world, context.parameters, context.bucket_mib, peers.per_rank, alone=peers.size == 1
        )

    def check_memory(self, *, in_update: bool = False) -> None:
        self.parameters.adopt(in_update=in_update)

    def taken_in(self) -> AbstractContextManager[None]:
        return self.parameters.taken_in()

    def detach(self) -> None:
        self.select_peer(0)
        self._put_consensus_in_place()
        self.parameters.release()
        del self.parameters  # the last views of the shared memory, which can then be freed

    def select_peer(self, index: int) -> None:
        self.parameters.select(index)

    def consensus_weight(self, peer: int) -> float:
        """Return the weight of a peer's model in the consensus; the weights of all peers sum to 1."""
        return 1.0 / self.context.peers.size

    def averaged(self) -> AbstractContextManager[None]:
        return self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        self.context.world.progress.drain()  # communication in flight reads and writes the models
        saved = self.parameters.copy()
        self._put_consensus_in_place()
        try:
            yield
        finally:
            self.parameters.restore(saved)

    def _put_consensus_in_place(self) -> None:
        """Overwrite the model in place with the consensus, of the same bits on all ranks; collective."""
        context, parameters = self.context, self.parameters
        if context.peers.size == 1:
            return
        context.world.progress.drain()
        weights = [self.consensus_weight(peer) for peer in context.peers.local]
        for bucket in parameters.group:
            models = [group.buckets[bucket.index].flat for group in parameters.groups]
            weighted_sum(bucket.flat, list(zip(models, weights, strict=True)))
        allreduce(parameters.group, 1.0, context.algorithm)

    def consensus_distance(self) -> float:
        """Return the root of the squared distances from the consensus, weighted as in it; collective."""
        context, squared = self.context, 0.0
        current, groups = context.current_peer_index, self.parameters.groups
        current_values = self.parameters.copy()
        with self.averaged():
            mean = self.parameters.copy()
            for index, peer in enumerate(context.peers.local):
                # The group of the current peer holds the consensus meanwhile.
                values = current_values if index == current else [bucket.flat for bucket in groups[index]]
                pairs = zip(mean, values, strict=True)
                distance = sum(float((a - b).double().square().sum()) for a, b in pairs)
                squared += self.consensus_weight(peer) * distance
        return math.sqrt(sum(context.world.gather(squared)))
