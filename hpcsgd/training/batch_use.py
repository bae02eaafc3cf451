"""The use that the user's loop makes of each batch: a step, a backward pass, or none."""

from __future__ import annotations

from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies.context import StrategyContext

_SAMPLES = 16  # parameters, evenly spaced, whose gradients show a backward pass
_FEW_SAMPLES = 2  # where the strategy nearly always sees it: of checkpoints inside others it does not


class BatchUse:
    """Counts the steps of a loop over batches, and finds batches of which nothing was made.

    Parameters
    ----------
    context
        The context of the run.
    counted
        Whether the loop ends after a number of steps.

    Attributes
    ----------
    steps
        Steps of this loop; a batch without gradients counts as one, as in evaluation.
    """

    def __init__(self, context: StrategyContext, *, counted: bool) -> None:
        self._context = context
        self._first_step, self._steps_before, self._unused = context.step, context.loop.steps, 0
        trained = [p for _, p in context.parameters if p.requires_grad]
        every = -(-len(trained) // (_FEW_SAMPLES if context.loop.sees_backward else _SAMPLES)) or 1
        self._samples = trained[::every] if counted or context.world.size > 1 else []

    @property
    def steps(self) -> int:
        return self._context.step - self._first_step + self._unused

    def begin(self) -> None:
        """Record that a batch is handed out."""
        self._context.loop.batches += 1
        self._context.loop.batch_used = False
        self._marks = self._gradients()

    def is_unused(self) -> bool:
        """Return whether neither a step nor a gradient has followed the last batch."""
        # The gradients, where they accumulate.
        return not self._context.loop.batch_used and self._gradients() == self._marks

    def check(self) -> None:
        """Check the use of the last batch.

        Raises
        ------
        HpcsgdError
            The loop has taken steps, and this rank has taken none and computed no gradient with this batch.
        """
        loop, world = self._context.loop, self._context.world
        if not self.is_unused():
            return
        self._unused += 1
        if world.size > 1 and loop.steps > self._steps_before:
            raise HpcsgdError(
                "took its next batch without run.step() or run.skip() after the last one",
                rank=world.global_rank,
                expected="a step in each turn of the loop: the other ranks wait in theirs",
                got=f"none with batch {loop.batches}, after {self._context.step} steps",
                do="call run.skip() where a batch is left out, so that all ranks leave the step out",
            )

    def end(self) -> None:
        """End the loop, which may be inside of another one."""
        self._context.loop.batch_used = True

    def _gradients(self) -> list[tuple[int, int]]:
        return [(id(p.grad), 0 if p.grad is None else p.grad._version) for p in self._samples]
