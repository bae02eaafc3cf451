"""Iterations in real time: their participants are the ranks that are done first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from hpcsgd.collectives.staging import wait_for_compute
from hpcsgd.mpi.world import World
from hpcsgd.strategies.backup_workers.agreement import CLOSE_OF_ITERATION, Edges, make_agreement
from hpcsgd.strategies.context import StrategyContext


class RealTime:
    """Steps of one peer a rank, each followed by the agreement of all ranks on the participants.

    Parameters
    ----------
    world
        The ranks.
    edges, backups
        Parameters of the `IterationCloser`.

    Attributes
    ----------
    seconds
        0: there is no virtual time.
    """

    seconds = 0.0

    def __init__(self, world: World, edges: Edges, backups: int | None) -> None:
        self._agreement = make_agreement(world, edges, backups)

    def schedule(self, context: StrategyContext, end: int) -> Iterator[int]:
        """Yield the local peer of each next step, until iteration `end`."""
        while context.step < end:
            yield 0

    def end_step(self, context: StrategyContext, end: int) -> tuple[int, list[int]] | None:
        """Return the iteration that has closed, and its participants; None at `end`."""
        wait_for_compute(context.world.device)  # a GPU may still compute the step
        closed: tuple[int, list[int]] | None
        closed = context.world.progress.run(CLOSE_OF_ITERATION, partial(self._agreement.join, end))
        if closed is None:
            context.step = end
        return closed

    def close(self) -> None:
        """Finish all communication; collective."""
        self._agreement.close()

    def abandon(self) -> None:
        """Stop after the run was dropped or left; local."""
        self._agreement.abandon()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the iterations at the end of a loop."""
        return self._agreement.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._agreement.load_state_dict(state)
