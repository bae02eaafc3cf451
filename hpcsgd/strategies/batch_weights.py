"""The user's loops over batches: their state, and which peers have a batch of their own."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hpcsgd.collectives.peers import Peers
from hpcsgd.errors import format_ranks
from hpcsgd.mpi.world import World

#: The weights of this process that follow loops over batches of each other's runs.
_followers: weakref.WeakSet[BatchWeights] = weakref.WeakSet()
_KEPT_BATCHES = (
    "steps after the end of a loop over run.batches(), in which ranks without a batch have repeated one: of "
    "batches that were kept (list, itertools.cycle) such may count in full. Iterate over run.batches(loader) "
    "again in each epoch, and use each batch when it is taken"
)


@dataclass
class LoopState:
    """The user's loop, as far as it has come."""

    batches: int = 0  # number of batches that this rank has taken since the start of the run
    batch_used: bool = True  # whether a backward pass, a step or `skip` has followed the last batch
    sees_backward: bool = False  # whether the strategy sets `batch_used` in backward passes
    steps: int = 0  # steps taken, also those left out, since the start of the run
    #: Weight of this rank's gradients in this step, as the user has given it; None: equal weights.
    weight: float | None = None
    skipped: bool = False  # whether this rank leaves the current step out
    #: Whether the optimizer computes the gradients of this step by calls of a closure.
    has_closure: bool = False
    structure: int = 0  # checksum of the names of the trained parameters
    equal_peers: list[int] = field(default_factory=list)  # peers whose first batch in this loop was the same
    is_open: bool = False  # whether a loop over batches is in progress


@dataclass(eq=False)
class OpenLoop:
    """A loop over batches that is in progress, which may be inside of another one."""

    has_batch: list[bool]  # for each peer, whether the current batch of the loop is one of its own


class BatchWeights:
    """Which peers have a batch of their own: the others repeat one, with weight 0.

    Attributes
    ----------
    of_step
        For each peer, whether it has a batch of its own in this step: of several, whether the first is.
    current
        The same of the current batch.
    on_change
        Called on all ranks before `current` changes within a step; None: not needed.
    """

    def __init__(self, world: World, peers: Peers, loop: LoopState) -> None:
        self._world, self._peers, self._loop = world, peers, loop
        self.on_change: Callable[[], None] | None = None
        self._open_loops: list[OpenLoop] = []
        self._followed, self._follows = [True] * peers.size, tuple[int, ...]()
        self._taken_ahead: list[list[bool]] = []
        self._steps_allowed, self._warnings = math.inf, set[str]()
        self.begin_step()

    def begin_step(self) -> None:
        """Begin the next step, with the current batch until another one is taken."""
        self._taken_ahead = self._taken_ahead[1:]
        self._steps_allowed -= not self._open_loops
        if self._steps_allowed < 0:
            self.warn_once("kept batches", _KEPT_BATCHES, level=1)
        self.of_step = self.current = self._of_open_loop()
        self._is_decided, self._has_taken = False, bool(self._taken_ahead)

    def follow(self) -> None:
        """Share the weights with other synchronous runs of this process on the same ranks."""
        self._follows = self._peers.size, *self._world.all.ranks
        _followers.add(self)

    def begin_loop(self) -> OpenLoop:
        """Begin a loop over batches, of which the next step is."""
        self._taken_ahead, self._steps_allowed = [], math.inf
        self._open_loops.append(OpenLoop([True] * self._peers.size))
        self._is_decided = False
        return self._open_loops[-1]

    def set(self, loop: OpenLoop, has_batch: list[bool]) -> None:
        """Record which peers have the next batch of a loop."""
        if has_batch != self.current and not self._loop.batch_used and len(self._open_loops) > 1:
            self._warn_of_two_loops(has_batch)
        loop.has_batch = has_batch
        self._change_current(has_batch)
        self._has_taken = True
        if not self._is_decided:
            self.of_step, self._is_decided = has_batch, True
        self._share_with_followers(has_batch)

    def warn_once(self, kind: str, text: str, *, level: int = 0) -> None:
        """Warn of a kind of problem, once a run and on rank 0 alone, at the line of the loop over batches.

        `level` is the number of calls between `synchronous_batches` and this one.
        """
        if self._world.rank == 0 and kind not in self._warnings:
            self._warnings.add(kind)
            warnings.warn(text, RuntimeWarning, stacklevel=5 + level)

    def _warn_of_two_loops(self, has_batch: list[bool]) -> None:
        """Warn that a batch of two loops, of which one is not its own, decides the weight of a peer."""
        peers = [peer for peer, has in enumerate(has_batch) if has != self.current[peer]]
        ranks = sorted({self._world.all.ranks[peer // self._peers.per_rank] for peer in peers})
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

    def end_use(self) -> None:
        """Go on with the next of the batches that were taken ahead, within a step."""
        if len(self._taken_ahead) > 1 and not self._open_loops:
            self._taken_ahead = self._taken_ahead[1:]
            self._change_current(self._taken_ahead[0])

    def end_loop(self, loop: OpenLoop) -> None:
        """Go on with the loop around a loop, or with none."""
        if loop not in self._open_loops:
            return
        self._open_loops.remove(loop)
        outside = self._of_open_loop()
        self._change_current(outside)
        self._has_taken |= bool(self._taken_ahead)
        self.of_step = outside
        self._is_decided = bool(self._open_loops)
        self._share_with_followers(outside)

    def _share_with_followers(self, has_batch: list[bool]) -> None:
        """Give the weights of this loop to runs that have none of their own, as the second one of a GAN."""
        if not self._follows:
            return
        for other in list(_followers):
            if other._follows == self._follows and other is not self and not other._open_loops:
                other._follow_to(has_batch)

    def _follow_to(self, has_batch: list[bool]) -> None:
        self._followed = has_batch
        self._change_current(has_batch)
        self._has_taken = True
        if not self._is_decided:
            self.of_step, self._is_decided = has_batch, True

    def _of_open_loop(self) -> list[bool]:
        if self._taken_ahead and not self._open_loops:
            return self._taken_ahead[0]
        return self._open_loops[-1].has_batch if self._open_loops else self._followed

    def _change_current(self, has_batch: list[bool]) -> None:
        if self.on_change and self._has_taken and has_batch != self.current:
            self.on_change()
        self.current = has_batch
