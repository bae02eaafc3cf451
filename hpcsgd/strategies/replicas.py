"""What the methods share whose peers have models of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from hpcsgd.collectives import allreduce
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import Setting
from hpcsgd.tensors.parameters import Parameters
from hpcsgd.tensors.weighted_sum import combine


class OwnModels(Strategy):
    """A method whose peers each have a model, in a tensor group; consensus is their weighted mean."""

    parameters: Parameters

    def attach(self, setting: Setting) -> None:
        super().attach(setting)
        self.parameters = Parameters(
            setting.world, setting.parameters, setting.bucket_mib, setting.peers.each
        )

    def detach(self) -> None:
        self.enter(0)
        self.parameters.release()
        del self.parameters  # the last views of the shared window, which can then be freed

    def enter(self, turn: int) -> None:
        self.parameters.enter(turn)

    def share(self, peer: int) -> float:
        """How much a peer's model counts in the consensus; over all peers these add up to 1."""
        return 1.0 / self.setting.peers.size

    def averaged(self) -> AbstractContextManager[None]:
        return self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        parameters = self.parameters
        self.setting.world.progress.drain()  # what is on its way reads and writes the models
        own = parameters.copy()
        shares = [self.share(peer) for peer in self.setting.peers.local]
        for bucket in parameters.group:
            models = [group.buckets[bucket.index].flat for group in parameters.groups]
            combine(bucket.flat, list(zip(models, shares, strict=True)))
        allreduce(parameters.group, 1.0, self.setting.algorithm)
        try:
            yield
        finally:
            parameters.restore(own)

    def consensus_distance(self) -> float:
        """Root mean square of the distances of the models from the consensus, weighted as in it."""
        setting, squared = self.setting, 0.0
        turn, groups = setting.turn, self.parameters.groups
        own = self.parameters.copy()
        with self.averaged():
            mean = self.parameters.copy()
            for index, peer in enumerate(setting.peers.local):
                values = own if index == turn else [bucket.flat for bucket in groups[index]]
                pairs = zip(mean, values, strict=True)
                distance = sum(float((a - b).double().square().sum()) for a, b in pairs)
                squared += self.share(peer) * distance
        return math.sqrt(sum(setting.world.gather(squared)))
