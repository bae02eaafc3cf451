"""`StrategyContext`: the state that a `Run` shares with its strategy (ranks, model, options, step)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpcsgd.collectives.peers import Peers
from hpcsgd.errors import BadOption, format_ranks
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB

if TYPE_CHECKING:
    from hpcsgd.compress import Compressor
    from hpcsgd.tensors.gradients import Named

#: The contexts of this process that follow loops over batches of each other.
_followers: weakref.WeakSet[StrategyContext] = weakref.WeakSet()
_KEPT_BATCHES = (
    "steps after the end of a loop over run.batches(), in which ranks without a batch have repeated one: of "
    "batches that were kept (list, itertools.cycle) such may count in full. Iterate over run.batches(loader) "
    "again in each epoch, and use each batch when it is taken"
)


@dataclass
class LoopState:
    """The user's loop, as far as it has come: shared by a context and those made of it by `on`.

    Attributes
    ----------
    batches
        Number of batches that this rank has taken since the start of the run.
    batch_used
        Whether a backward pass, a step or `skip` has followed the last batch.
    sees_backward
        Whether the strategy sets `batch_used` in backward passes.
    steps
        Steps taken, also those left out, since the start of the run.
    weight
        Weight of this rank's gradients in this step, as the user has given it; None: equal weights.
    skipped
        Whether this rank leaves the current step out.
    has_closure
        Whether the optimizer computes the gradients of this step by calls of a closure.
    structure
        Checksum of the names of the trained parameters.
    equal_peers
        Peers whose first batch in this loop was the same.
    is_open
        Whether a loop over batches is in progress.
    """

    batches: int = 0
    batch_used: bool = True
    sees_backward: bool = False
    steps: int = 0
    weight: float | None = None
    skipped: bool = False
    has_closure: bool = False
    structure: int = 0
    equal_peers: list[int] = field(default_factory=list)
    is_open: bool = False


@dataclass(eq=False)
class OpenLoop:
    """A loop over batches that is in progress, which may be inside of another one.

    Attributes
    ----------
    has_batch
        For each peer, whether the current batch of the loop is one of its own.
    """

    has_batch: list[bool]


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
    has_batch
        For each peer, whether it has a batch of its own in this step (else it repeats one with weight 0): of
        several batches of one step, whether the first is.
    has_current
        The same of the current batch.
    on_new_weights
        Called on all ranks before `has_current` changes within a step; None: not needed.
    follows
        Number of peers, and the ranks: this context has the weights of loops of other runs with the same.
    loop
        The state of the user's loop.
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
    loop: LoopState = field(default_factory=lambda: LoopState())
    peers: Peers = field(init=False)
    current_peer_index: int = field(default=0, init=False)
    step_taken: bool = field(default=False, init=False)
    has_batch: list[bool] = field(init=False)
    has_current: list[bool] = field(init=False)
    on_new_weights: Callable[[], None] | None = field(default=None, init=False)
    follows: tuple[int, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.peers = Peers(self.world, self.virtual_nodes)
        self._open_loops: list[OpenLoop] = []
        self._warnings: set[str] = set()
        self._taken_ahead: list[list[bool]] = []
        self._steps_allowed = math.inf
        self._followed = [True] * self.peers.size
        self.begin_step()

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
        return int(self.has_batch[self.peer])

    @property
    def batch_weight(self) -> int:
        """1 if the current batch is one of this peer's own, else 0."""
        return int(self.has_current[self.peer])

    @property
    def contributors(self) -> int:
        """Number of peers whose current batch is one of their own."""
        return sum(self.has_current)

    def reject(self, method: str, *, compression: bool = False, virtual_nodes: bool = False) -> None:
        """Raise on all ranks if the run uses a feature that a method does not support.

        Parameters
        ----------
        method
            Name of the method, for the error.
        compression, virtual_nodes
            True: not supported. Default False.

        Raises
        ------
        BadOption
            On all ranks.
        """
        if compression and self.compress is not None:
            raise BadOption(
                f"{method} sends whole models and cannot compress them",
                got=f"compress={self.compress}",
                do="use strategy allreduce, local, lasgd or ps, or set compress to none",
                everywhere=True,
            )
        if virtual_nodes and self.peers.per_rank > 1:
            raise BadOption(
                f"{method} has no virtual nodes",
                got=f"{self.peers.size} nodes on {self.world.size} ranks",
                do="use a gossip strategy (dsgd, sgp, backup, teleport), or do not set virtual_nodes",
                everywhere=True,
            )

    def require_torch_optimizer(self, method: str) -> None:
        """Raise `BadOption` on all ranks where the optimizer is not one of torch, whose state is read."""
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise BadOption(
                f"{method} cannot use the optimizer {type(self.optimizer).__name__}",
                expected="one torch.optim.Optimizer",
                do="pass such an optimizer, or use another strategy, such as allreduce, local or lasgd",
                everywhere=True,
            )

    def begin_step(self) -> None:
        """Begin the next step, with the current batch until another one is taken."""
        self._taken_ahead = self._taken_ahead[1:]
        self._steps_allowed -= not self._open_loops
        if self._steps_allowed < 0:
            self.warn_once("kept batches", _KEPT_BATCHES, level=1)
        self.has_batch = self.has_current = self._of_open_loop()
        self._is_decided = self._has_taken = False

    def follow(self) -> None:
        """Share the weights of batches with other synchronous runs of this process on the same ranks."""
        self.follows = self.peers.size, *self.world.all.ranks
        _followers.add(self)

    def begin_loop(self) -> OpenLoop:
        """Begin a loop over batches, of which the next step is."""
        self._taken_ahead, self._steps_allowed = [], math.inf
        self._open_loops.append(OpenLoop([True] * self.peers.size))
        self._is_decided = False
        return self._open_loops[-1]

    def set_batches(self, loop: OpenLoop, has_batch: list[bool]) -> None:
        """Record which peers have the next batch of a loop."""
        if has_batch != self.has_current and not self.loop.batch_used and len(self._open_loops) > 1:
            self._warn_of_two_loops(has_batch)
        loop.has_batch = has_batch
        self._change_current(has_batch)
        self._has_taken = True
        if not self._is_decided:
            self.has_batch, self._is_decided = has_batch, True
        self._share_with_followers(has_batch)

    def warn_once(self, kind: str, text: str, *, level: int = 0) -> None:
        """Warn of a kind of problem, once a run and on rank 0 alone, at the line of the loop over batches.

        Parameters
        ----------
        kind, text
            The kind, and the warning.
        level
            Number of calls between `synchronous_batches` and this one. Default 0.
        """
        if self.world.rank == 0 and kind not in self._warnings:
            self._warnings.add(kind)
            warnings.warn(text, RuntimeWarning, stacklevel=5 + level)

    def _warn_of_two_loops(self, has_batch: list[bool]) -> None:
        """Warn that a batch of two loops, of which one is not its own, decides the weight of a peer."""
        peers = [peer for peer, has in enumerate(has_batch) if has != self.has_current[peer]]
        ranks = sorted({self.world.all.ranks[peer // self.peers.per_rank] for peer in peers})
        self.warn_once(
            "two loops",
            f"two loops over run.batches() have a batch each in one step, and {format_ranks(ranks)} a new "
            "one in one of them only, for their lengths differ: its weight is that of the loop that took its "
            "batch last (run.weight). Give all ranks equally many batches, or pass uneven='stop' to Run",
            level=2,
        )

    def set_taken_ahead(self, has_batch: Sequence[list[bool]], *, are_all: bool) -> None:
        """Record which peers have batches that a loop has taken, and uses after its end: one a step.

        For loops in which some peers have repeated batches.

        Parameters
        ----------
        has_batch
            Of each such batch, for each peer, whether it is one of its own.
        are_all
            Whether the loop has used none.
        """
        self._taken_ahead = list(has_batch)
        # One for a rest of accumulated gradients.
        self._steps_allowed = 0 if are_all else len(self._taken_ahead) + 1

    def end_loop(self, loop: OpenLoop) -> None:
        """Go on with the loop around a loop, or with none."""
        if loop not in self._open_loops:
            return
        self._open_loops.remove(loop)
        outside = self._of_open_loop()
        self._change_current(outside)
        self.has_batch = outside
        self._is_decided = bool(self._open_loops)
        self._share_with_followers(outside)

    def _share_with_followers(self, has_batch: list[bool]) -> None:
        """Give the weights of this loop to runs that have none of their own, as the second one of a GAN."""
        if self.follows is None:
            return
        for other in list(_followers):
            if other.follows == self.follows and other is not self and not other._open_loops:
                other._followed = other.has_batch = other.has_current = has_batch

    def _of_open_loop(self) -> list[bool]:
        if self._taken_ahead and not self._open_loops:
            return self._taken_ahead[0]
        return self._open_loops[-1].has_batch if self._open_loops else self._followed

    def _change_current(self, has_batch: list[bool]) -> None:
        if self.on_new_weights and self._has_taken and has_batch != self.has_current:
            self.on_new_weights()
        self.has_current = has_batch
