"""What a strategy is: when ranks communicate, and what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from hpcsgd.collectives.peers import Peers
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.tensors.tensors import Bucket

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


class Strategy:
    """One method of distributed SGD; a subclass overrides what it does differently from training alone.

    All methods are called on every rank, by the thread that runs the user's loop.

    Attributes
    ----------
    lockstep
        Whether every peer takes every step. Else `turns` says whose turn it is, the loaders begin
        again when they are through, and `step` itself counts `setting.step` up.
    """

    setting: Setting
    lockstep = True

    def options(self) -> dict[str, object]:
        """The options that all ranks must agree on, by name."""
        return {}

    def workers(self, ranks: int) -> int:
        """How many of so many ranks compute gradients: the first ones."""
        return ranks

    def fit(self, peers: int) -> None:
        """Ask for no more than so few peers can do, because others have died."""

    def attach(self, setting: Setting) -> None:
        """Take up a model; it has the same values on all ranks."""
        self.setting = setting

    def detach(self) -> None:
        """Leave the model in memory of its own, without hooks; nothing is in flight any more."""

    def enter(self, turn: int) -> None:
        """Let the module show the model of this rank's peer number `turn`."""

    def turns(self, end: int) -> Iterator[int]:
        """Where not in lockstep: which of this rank's peers is to take a step next, until step `end`.

        Its model is in place when it is yielded; `step` has been called when the next one is asked for.
        """
        raise NotImplementedError

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, backward adds to the gradients and starts no communication."""
        return nullcontext()

    def bucket_ready(self, bucket: Bucket) -> None:
        """The gradients of a bucket are complete; called in bucket order, from within backward."""

    def synchronize(self) -> None:
        """Bring the gradients to what the optimizer shall see; idempotent until the next backward."""

    def step(self, update: Callable[[], None]) -> None:
        """One training step; `update` lets the optimizer change the model."""
        update()

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model is the consensus of all ranks; afterwards training goes on from its own."""
        return nullcontext()

    def consensus_distance(self) -> float:
        """Root mean square over ranks of the distance of their models from the mean model."""
        return 0.0

    def model_step(self) -> int:
        """Which step's model this rank has: an older one where it rests; -1: that of the start."""
        return self.setting.step

    def figures(self) -> dict[str, Any]:
        """What this method adds to a record of metrics, of this rank, since the last call."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beyond model and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
