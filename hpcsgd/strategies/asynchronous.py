"""`AsynchronousStrategy`: base class of the methods in which each rank takes steps at its own pace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.replicas import ReplicaStrategy

NO_TARGET = 2**62


class AsynchronousStrategy(ReplicaStrategy, ABC):
    """A method whose ranks take steps at their own pace, while models are averaged in the background.

    Iterations are the steps of all ranks divided by their number; a rank may take more steps than another, or
    none. A subclass takes a step, counts the steps of all ranks as far as it knows them, and settles. One
    whose instances may be synchronous too sets `synchronous`: then each rank takes each step.

    Attributes
    ----------
    target
        Steps of all ranks together at which the loop in progress ends; outside of a loop `NO_TARGET`.
    """

    synchronous = False
    averages_in_background = True

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        self.target = NO_TARGET
        self._is_free = False  # whether steps were taken outside of a loop, of which others may not know yet
        self.deterministic = self.synchronous or context.peers.size == 1

    @abstractmethod
    def take_step(self, update: Callable[[], None]) -> None:
        """Make the optimizer change the model by `update`, and take in what the background has averaged."""

    @abstractmethod
    def total_steps(self) -> int:
        """Return the steps of all ranks, as far as this one knows; after `settle` all of them."""

    @abstractmethod
    def settle(self) -> None:
        """Wait until nothing is averaged in the background, on any rank; collective."""

    def begin_step(self) -> None:
        """Prepare a step, before its batch."""

    def is_finished(self) -> bool:
        """Return whether this rank takes no more steps in the loop in progress."""
        return self.total_steps() >= self.target

    def finish(self) -> None:
        """Let the others know that this rank takes no more steps in this loop; collective."""

    def peer_schedule(self, end: int) -> Iterator[int]:
        self.target = end * self.context.peers.size
        try:
            while not self.is_finished():
                self.begin_step()
                yield 0
            with self.context.world.calls.ending():
                self.finish()
                self.settle()
            self.context.step = end
        finally:
            self.target = NO_TARGET

    def step(self, update: Callable[[], None]) -> None:
        self.take_step(update)
        self._count_steps()
        self._is_free |= self.target == NO_TARGET

    def quiesce(self) -> None:
        self.settle()
        if self._is_free:
            self._count_steps()
            self._is_free = False

    def _count_steps(self) -> None:
        if not self.synchronous:
            self.context.step = min(self.total_steps(), self.target) // self.context.peers.size
