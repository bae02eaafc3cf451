"""`StrategyContext`: the state that a `Run` shares with its strategy (ranks, model, options, step)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpcsgd.collectives.peers import Peers
from hpcsgd.errors import BadOption
from hpcsgd.mpi.world import World
from hpcsgd.strategies.batch_weights import BatchWeights, LoopState
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB

if TYPE_CHECKING:
    from hpcsgd.compress.base import Compressor
    from hpcsgd.tensors.gradients import Named


@dataclass(kw_only=True, eq=False, repr=False)
class StrategyContext:
    """The input of a strategy: given to `Strategy.attach`, and updated by `Run` during training.

    Attributes
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs of the model, without duplicates, in the model's order.
    bucket_mib, algorithm, unused, compress, seed, nonfinite, virtual_nodes, optimizer
        The options of `Run` with these names.
    model
        The module that is trained.
    wait
        When gradients are complete: at the end of each "backward" pass, or with `synchronize` or the "step".
    sparse_rows
        Names of the parameters whose gradients are sparse and summed by row.
    unscale
        Divides the gradients by the scale of a GradScaler; returns False if this step must be skipped.
    step
        Number of the step that is being taken, from 0.
    peers
        All peers that train: one a rank, or several with virtual nodes.
    current_peer_index
        Index, from 0, of the local peer whose model, optimizer state and buffers are in place.
    step_taken
        Whether this peer has taken the step for which it got its last batch.
    batches
        Which peers have a batch of their own.
    loop
        The state of the user's loop: shared by a context and those made of it by `on`.
    """

    world: World
    parameters: Named
    bucket_mib: float = DEFAULT_BUCKET_MIB
    algorithm: str = "auto"
    unused: str = "zeros"
    compress: Compressor | None = None
    seed: int = 0
    nonfinite: str = "error"
    virtual_nodes: int | None = None
    optimizer: torch.optim.Optimizer | None = None
    model: nn.Module | None = None
    wait: str = "backward"
    sparse_rows: Collection[str] = ()
    unscale: Callable[[], bool] = lambda: True
    step: int = 0
    loop: LoopState = field(default_factory=LoopState)
    peers: Peers = field(init=False)
    current_peer_index: int = field(default=0, init=False)
    step_taken: bool = field(default=False, init=False)
    batches: BatchWeights = field(init=False)

    def __post_init__(self) -> None:
        self.peers = Peers(self.world, self.virtual_nodes)
        self.batches = BatchWeights(self.world, self.peers, self.loop)

    def on(self, world: World) -> StrategyContext:
        """Return a copy for some of the ranks, one peer each, with a step count of its own."""
        return replace(self, world=world, virtual_nodes=None)

    @property
    def peer(self) -> int:
        """The peer whose model is in place."""
        return self.peers.local[self.current_peer_index]

    @property
    def weight(self) -> int:
        """1 if this peer has a batch of its own in this step, else 0."""
        return int(self.batches.of_step[self.peer])

    @property
    def batch_weight(self) -> int:
        """1 if the current batch is one of this peer's own, else 0."""
        return int(self.batches.current[self.peer])

    @property
    def contributors(self) -> int:
        """Number of peers whose current batch is one of their own."""
        return sum(self.batches.current)

    def require_torch_optimizer(self, method: str) -> None:
        """Raise `BadOption` on all ranks where the optimizer is not one of torch, whose state is read."""
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise BadOption(
                f"{method} cannot use the optimizer {type(self.optimizer).__name__}",
                expected="one torch.optim.Optimizer",
                do="pass such an optimizer, or use another strategy, such as allreduce, local or lasgd",
                everywhere=True,
            )
