"""AR-SGD: the mean gradient of all ranks in every step, reduced while backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from hpcsgd.collectives.reducer import reduction
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import Setting
from hpcsgd.tensors.gradients import Gradients
from hpcsgd.tensors.group import Bucket


class AllReduce(Strategy):
    """Synchronous SGD on the mean gradient; n ranks with batch b are one process with batch n*b."""

    def attach(self, setting: Setting) -> None:
        setting.refuse("all-reduce SGD", virtual_nodes=True)
        super().attach(setting)
        self._finite = True
        self.gradients = Gradients(
            setting.world,
            setting.parameters,
            self.bucket_ready,
            setting.bucket_mib,
            setting.unused,
        )
        self._reduction = reduction(
            self.gradients.group,
            setting.algorithm,
            setting.compress,
            setting.seed,
            setting.nonfinite,
        )

    def detach(self) -> None:
        self.setting.world.progress.drain()
        self.gradients.release()
        del self.gradients, self._reduction  # the last views of the shared window, which can then be freed

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
        if self.setting.weight == 0:
            bucket.flat.zero_()
        self._reduction.start(bucket, 1.0 / self.setting.active, self._number())

    def _number(self) -> int | None:
        """Of the reductions of this step; None: that of the run's step."""
        return None

    def synchronize(self) -> None:
        self.gradients.finish()
        self._finite &= self._reduction.finish()

    def step(self, update: Callable[[], None]) -> None:
        self.synchronize()
        if self._finite:
            update()
        self._finite = True
        self.gradients.start_over()

    def state_dict(self) -> dict[str, Any]:
        return {"reduction": self._reduction.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reduction.load_state_dict(state["reduction"])
