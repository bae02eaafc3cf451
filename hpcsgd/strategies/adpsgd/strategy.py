"""AD-PSGD: peers average in pairs with random neighbours, and nobody waits for a slower one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from hpcsgd.errors import BadOption, unknown
from hpcsgd.strategies.adpsgd.async_pairs import Pairwise
from hpcsgd.strategies.adpsgd.pairing import Drawn, Pairs
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.replicas import OwnModels
from hpcsgd.tensors.parameters import Parameters
from hpcsgd.topology import build


class ADPSGD(OwnModels):
    """Asynchronous decentralised SGD: pairwise averages beside the gradients (Lian et al., arXiv 1710.06952).

    The graph has two halves; peers of the active one ask for averages, peers of the passive one answer,
    so no cycle of waits can form. Optimizer state stays local. From the paper: the halves, the average
    of two models with a random neighbour, gradients that are of a model from before an average. The rest is
    our reading:

    "free": no gradient step ever waits. An active peer asks one random neighbour a step, unless its last
    request is still out. Averages are of replicas; what a replica gains goes into the model at the end of a
    step, so forward and backward see no half-written model and a peer's gradients delay no one's average.
    Iterations are the steps of all peers, as far as a peer knows of them, divided by the number of peers; a
    rank may take more steps than another, or none. Memory of four more models, on the host.

    "drawn": every peer takes every step. Beside it each active peer, in an order that all ranks draw
    alike, averages with one neighbour that is drawn too; the step is then added: x <- average + step. Gives
    the same bits at each run, and with virtual nodes. Memory of one more model.

    Parameters
    ----------
    topology
        Who can average with whom, as NAME or NAME:key=value+key=value of `hpcsgd.topology`; bipartite:
        "ring" of an even number of peers (default), "hypercube", "star".
    schedule
        "free" (default) or "drawn".
    """

    def __init__(self, topology: str = "ring", schedule: Literal["free", "drawn"] = "free") -> None:
        if schedule not in ("free", "drawn"):
            raise unknown("schedule of AD-PSGD", schedule, ("free", "drawn"))
        self.topology, self.schedule = topology, schedule
        self.lockstep = schedule == "drawn"

    def options(self) -> dict[str, object]:
        return {"topology": self.topology, "schedule": self.schedule}

    def attach(self, setting: Setting) -> None:
        setting.refuse("AD-PSGD", compression=True)
        pairs = Pairs(setting.world.together(lambda: build(self.topology, setting.peers.size)))
        if not self.lockstep:
            _check_free(setting)
        super().attach(setting)
        self._averaging: Drawn | Free = (
            Drawn(setting, self.parameters, pairs) if self.lockstep else Free(setting, self.parameters, pairs)
        )

    def detach(self) -> None:
        self._averaging.close()
        del self._averaging
        super().detach()

    def turns(self, end: int) -> Iterator[int]:
        assert isinstance(self._averaging, Free), "else all peers keep step"
        return self._averaging.turns(end)

    def step(self, update: Callable[[], None]) -> None:
        self._averaging.step(update)

    def averaged(self) -> AbstractContextManager[None]:
        self._averaging.settle()
        return super().averaged()

    def consensus_distance(self) -> float:
        self._averaging.settle()
        return super().consensus_distance()

    def state_dict(self) -> dict[str, Any]:
        """With the schedule "free" collective, and only between two loops over batches."""
        return self._averaging.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averaging.load_state_dict(state)


class Free:
    """Pairs that average whenever an active peer has taken a step and has no request out.

    Parameters
    ----------
    setting, parameters, pairs
        The run's; the model; who can average with whom.
    """

    def __init__(self, setting: Setting, parameters: Parameters, pairs: Pairs) -> None:
        me = setting.world.rank
        self._setting, self._end = setting, 2**62
        self._pairwise = Pairwise(
            setting.world,
            parameters.group,
            pairs.neighbours[me],
            active=me in pairs.active,
            seed=setting.seed,
        )

    def turns(self, end: int) -> Iterator[int]:
        self._end = end
        while self._pairwise.steps < end * self._setting.peers.size:
            yield 0
        self._pairwise.finish()
        self._pairwise.settle()
        self._setting.step, self._end = end, 2**62

    def step(self, update: Callable[[], None]) -> None:
        update()
        self._pairwise.boundary()
        self._setting.step = min(self._pairwise.steps // self._setting.peers.size, self._end)

    def settle(self) -> None:
        self._pairwise.settle()

    def state_dict(self) -> dict[str, Any]:
        self._pairwise.settle()
        return {"steps": torch.from_numpy(self._pairwise.counts.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pairwise.settle()
        self._pairwise.reset(state["steps"].tolist())

    def close(self) -> None:
        self._pairwise.close()


def _check_free(setting: Setting) -> None:
    if setting.peers.each > 1:
        raise BadOption(
            "AD-PSGD whose peers do not keep step has no virtual nodes",
            got=f"{setting.peers.size} nodes on {setting.world.size} ranks",
            do="use schedule=drawn, which averages the same pairs of models in step",
            everywhere=True,
        )
