"""What a `Run` gives its strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hpcsgd.collectives.peers import Peers
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World

if TYPE_CHECKING:
    from hpcsgd.compress import Compressor
    from hpcsgd.tensors.gradients import Named


class Setting:
    """What a `Run` hands to its strategy.

    Attributes
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs of the model, without duplicates, in the model's order.
    bucket_mib, algorithm, unused, compress, seed, nonfinite, optimizer
        The run's of these names.
    peers
        Who takes part: the ranks, or with virtual nodes several peers a rank.
    turn
        Which of this rank's peers computes now, from 0.
    step
        The number of the step that is being taken, from 0.
    taken
        Whether the peer whose turn it is has taken its step.
    having
        For each peer, whether it has a batch of its own in this step, or repeats one to keep step.
    unscale
        Takes the scale of a GradScaler from the gradients; False: this step shall be left out.
    """

    def __init__(
        self,
        world: World,
        parameters: Named,
        bucket_mib: float,
        algorithm: str,
        unused: str,
        compress: Compressor | None = None,
        seed: int = 0,
        nonfinite: str = "error",
        virtual_nodes: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.world = world
        self.peers = Peers(world, virtual_nodes)
        self.turn = self.step = 0
        self.taken = False
        self.parameters = parameters
        self.bucket_mib = bucket_mib
        self.algorithm = algorithm
        self.unused = unused
        self.compress = compress
        self.seed = seed
        self.nonfinite = nonfinite
        self.optimizer = optimizer
        self.unscale: Callable[[], bool] = lambda: True
        self.begin_step()

    @property
    def peer(self) -> int:
        """The peer that computes now."""
        return self.peers.local[self.turn]

    @property
    def weight(self) -> int:
        """1 where this peer has a batch of its own in this step, else 0."""
        return int(self.having[self.peer])

    @property
    def active(self) -> int:
        """How many peers have a batch of their own in this step."""
        return sum(self.having)

    def refuse(self, method: str, *, compression: bool = False, virtual_nodes: bool = False) -> None:
        """Raise on all ranks for what a method does not do."""
        if compression and self.compress is not None:
            raise BadOption(
                f"{method} sends whole models and cannot compress them",
                got=f"compress={self.compress}",
                do="use the strategy allreduce or local, or no compression",
                everywhere=True,
            )
        if virtual_nodes and self.peers.each > 1:
            raise BadOption(
                f"{method} has no virtual nodes",
                got=f"{self.peers.size} nodes on {self.world.size} ranks",
                do="use a gossip method, dsgd say",
                everywhere=True,
            )

    def begin_step(self) -> None:
        """Expect the batches of the next step."""
        self.having = [True] * self.peers.size
        self._told = False

    def batch(self, having: list[bool]) -> None:
        """Note which ranks have this batch; the first one of a step decides, the rest add to it."""
        if not self._told:
            self.having, self._told = having, True
