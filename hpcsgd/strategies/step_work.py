"""`StepWork`: communication of a step, which may be begun ahead of it."""

from __future__ import annotations

from collections.abc import Callable

from hpcsgd.collectives.staging import after_compute
from hpcsgd.diagnostics.traffic import Moved
from hpcsgd.mpi.tasks import Steps, steps_of, stepwise
from hpcsgd.mpi.world import World


class StepWork:
    """A job of the communication thread whose bytes count in the step that waits for it.

    So they do not depend on how far the job has come at an evaluation or a checkpoint, and a run that is
    resumed there, and begins the job again, has the same metrics as one that is not.

    Parameters
    ----------
    world
        The ranks.
    operation
        Name of the job.
    job
        See `Progress.submit`; on a GPU it is executed after all work that is queued there now.
    """

    def __init__(self, world: World, operation: str, job: Callable[[], Steps[None] | None]) -> None:
        self._traffic, self._moved, self._is_used = world.traffic, Moved(), False

        def counted() -> Steps[None]:
            return stepwise(lambda: self._traffic.counted_ahead(self._moved), steps_of(job))

        self._work = world.progress.submit(operation, after_compute(world.device, counted))

    def wait(self) -> None:
        """Wait for the job, and count its bytes if this is the first time."""
        self._work.wait()
        if not self._is_used:
            self._is_used = True
            self._traffic.use(self._moved)
