"""What the methods share whose peers all take a step and then exchange models in a topology."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.staging import after_compute
from hpcsgd.mpi.progress import Work
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.replicas import OwnModels
from hpcsgd.topology import build


class Gossip(OwnModels):
    """A method whose peers keep step and exchange models with their neighbours after each step.

    Parameters
    ----------
    topology
        Whom each peer exchanges with, as NAME or NAME:key=value+key=value of `hpcsgd.topology`, of which
        matrix t mod period is the one of step t.
    overlap
        Exchange while forward and backward run; costs memory of one more model.
    """

    #: Its name in errors.
    title: ClassVar[str]

    def __init__(self, topology: str, overlap: bool) -> None:
        self.topology, self.overlap = topology, overlap

    def options(self) -> dict[str, object]:
        return {"topology": self.topology, "overlap": self.overlap}

    def attach(self, setting: Setting) -> None:
        setting.refuse(self.title, compression=True)
        self.graph = setting.world.together(lambda: build(self.topology, setting.peers.size))
        super().attach(setting)
        self._exchange = Exchange(setting.peers, self.parameters.groups)
        #: For each local peer, what an exchange that began after the last step brings.
        self._brought = [
            [torch.empty_like(bucket.host) for bucket in group] if self.overlap else []
            for group in self.parameters.groups
        ]
        self._ahead: Work | None = None

    def detach(self) -> None:
        del self._exchange, self._ahead
        super().detach()

    def _submit(self, what: str, step: int, job: Callable[[int], None]) -> Work:
        """Hand `job(step)` to the communication thread; on a GPU it comes after what is queued there."""
        world = self.setting.world
        return world.progress.submit(f"{what} at step {step}", after_compute(world.device, lambda: job(step)))
