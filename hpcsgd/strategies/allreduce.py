"""AR-SGD: the mean gradient of all ranks in every step, reduced while backward still runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from hpcsgd.collectives import iallreduce
from hpcsgd.gradients import Gradients
from hpcsgd.progress import Work
from hpcsgd.strategies.base import Setting, Strategy
from hpcsgd.tensors import Bucket


class AllReduce(Strategy):
    """Synchronous SGD on the mean gradient; n ranks with batch b are one process with batch n*b."""

    def attach(self, setting: Setting) -> None:
        super().attach(setting)
        self._works: list[Work] = []
        self.gradients = Gradients(
            setting.world,
            setting.parameters,
            self.bucket_ready,
            setting.bucket_mib,
            setting.unused,
        )

    def detach(self) -> None:
        self.setting.world.progress.drain()
        self.gradients.release()
        del self.gradients  # the last view of the shared window, which can then be freed

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
        scale = 1.0 / self.setting.active
        self._works.append(iallreduce(bucket, scale, self.setting.algorithm))

    def synchronize(self) -> None:
        self.gradients.finish()
        works, self._works = self._works, []
        for work in works:
            work.wait()

    def step(self, update: Callable[[], None]) -> None:
        self.synchronize()
        update()
        self.gradients.start_over()
