"""AR-SGD: synchronous SGD whose gradients are all-reduced by buckets while backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.tensors.gradients import Gradients
from hpcsgd.tensors.group import Bucket


class AllReduce(Strategy):
    """Synchronous SGD on the mean gradient of all ranks: n ranks with batch b equal one with batch n*b.

    Buckets are all-reduced in the communication thread while backward computes the gradients of the next
    ones. A rank that has run out of batches contributes with weight 0. With `Run(compress=...)` the sums are
    compressed.
    """

    def attach(self, context: StrategyContext) -> None:
        context.reject("all-reduce SGD", virtual_nodes=True)
        super().attach(context)
        self._finite = True
        self.gradients = Gradients(
            context.world,
            context.parameters,
            self.bucket_ready,
            context.bucket_mib,
            context.unused,
        )
        self._reducer = make_reducer(
            self.gradients.group,
            context.algorithm,
            context.compress,
            context.seed,
            context.nonfinite,
        )

    def detach(self) -> None:
        self.context.world.progress.drain()
        self.gradients.release()
        del self.gradients, self._reducer  # the last views of the shared memory, which can then be freed

    def disconnect(self) -> None:
        if hasattr(self, "gradients"):
            self.gradients.disconnect()

    def accumulate(self) -> AbstractContextManager[None]:
        return self._accumulating()

    @contextmanager
    def _accumulating(self) -> Iterator[None]:
        self.gradients.accumulating = True
        try:
            yield
        finally:
            self.gradients.accumulating = False

    def bucket_ready(self, bucket: Bucket) -> None:
        if self.context.weight == 0:
            bucket.flat.zero_()
        self._reducer.start(bucket, 1.0 / self.context.contributors, self._reduction_number())

    def _reduction_number(self) -> int | None:
        """Number of this step's reductions, the key of their random numbers; None: the run's step."""
        return None

    def synchronize(self) -> None:
        self.gradients.finish()
        self._finite &= self._reducer.finish()

    def step(self, update: Callable[[], None]) -> None:
        self.synchronize()
        if self._finite:
            update()
        self._finite = True
        self.gradients.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"reduction": self._reducer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reducer.load_state_dict(state["reduction"])
