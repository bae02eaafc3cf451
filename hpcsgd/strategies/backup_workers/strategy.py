"""Dynamic backup workers: peers average with those that are done, and nobody waits for the slowest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.staging import after_compute, wait_for_compute
from hpcsgd.errors import HpcsgdError
from hpcsgd.strategies import delays as delay_specs
from hpcsgd.strategies.backup_workers.agreement import WHAT, Agreement, agreement
from hpcsgd.strategies.backup_workers.closing_rule import Rounds, fixed_backups
from hpcsgd.strategies.backup_workers.virtual_time import VirtualTime
from hpcsgd.strategies.context import Setting
from hpcsgd.strategies.replicas import OwnModels
from hpcsgd.topology import build
from hpcsgd.topology.graphs import adjacency
from hpcsgd.topology.mixing import metropolis_among


class BackupWorkers(OwnModels):
    """Decentralised SGD that waits for the fastest peers only; the others are its backup workers.

    cb-DyBW with the DTUR rule (Xiong, Yan, Singh, Li, arXiv 2102.06280): y_i = x_i - lr g_i(x_i), and an
    iteration closes once both ends of an edge are done that this epoch has not used yet, of a set P of
    edges that joins all peers; when all of P are used, the next epoch begins. Our reading: whoever is done
    at that instant takes part, with the edges of the topology among these and Metropolis weights; P is a
    path where there is one, else a tree; who is not done keeps computing on its own model and joins the
    iteration that is open when it finishes. A topology that varies counts with the edges of all its steps.

    Peers do not keep step: take batches from `run.batches`. A gradient that is only done when the last
    iteration asked for has closed becomes a step without averaging. Momentum and the like stay local.

    Parameters
    ----------
    topology
        Whom each peer averages with, NAME or NAME:key=value+key=value of `hpcsgd.topology`. Default "ring".
    backups
        "dynamic" (default), or for how many peers no iteration waits: 0 is cb-Full, of n at most n - 2.
    delays
        Other than "none": time is virtual. Gradients take as long as these delays say, as
        NAME or NAME:key=value+key=value of `hpcsgd.strategies.delays`, and who takes part follows from that
        alone, however fast what computes. With virtual nodes time is always virtual; "none": all take part.

    Attributes
    ----------
    record
        (iteration, peers that took part) of those of this rank, the last 10,000.
    virtual_seconds
        When the last iteration closed, in virtual time.
    """

    lockstep = False

    def __init__(
        self, topology: str = "ring", backups: Literal["dynamic"] | int = "dynamic", delays: str = "none"
    ) -> None:
        self.topology, self.backups, self.delays = topology, backups, delays
        self._draws = delay_specs.build(delays)

    def options(self) -> dict[str, object]:
        return {"topology": self.topology, "backups": self.backups, "delays": self.delays}

    def fit(self, peers: int) -> None:
        if isinstance(self.backups, int):
            self.backups = max(0, min(self.backups, peers - 2))

    def attach(self, setting: Setting) -> None:
        setting.refuse("dynamic backup workers", compression=True)
        graph = setting.world.together(lambda: build(self.topology, setting.peers.size))
        size, edges = graph.size, graph.spanning()
        fixed = fixed_backups(self.backups, size)
        super().attach(setting)
        self._near = adjacency(size, graph.edges())
        self._exchange = Exchange(setting.peers, self.parameters.groups)
        self._order: VirtualTime | Agreement
        if self.delays != "none" or setting.peers.each > 1:
            self._order = VirtualTime(Rounds(size, edges, fixed), self._draws)
        else:
            self._order = agreement(setting.world, edges, fixed)
        self._end: int | None = None
        self.virtual_seconds = 0.0
        self.record: deque[tuple[int, list[int]]] = deque(maxlen=10_000)

    def detach(self) -> None:
        self._order.close()
        del self._exchange, self._order
        super().detach()

    def turns(self, end: int) -> Iterator[int]:
        setting, order = self.setting, self._order
        self._end = end
        try:
            while setting.step < end:
                if isinstance(order, VirtualTime):
                    self._members = order.next()
                    self.virtual_seconds = order.seconds
                    self._due = [peer for peer in self._members if peer in setting.peers.local]
                    if not self._due:
                        setting.step += 1
                    while self._due:
                        yield setting.peers.index(self._due[0])
                else:
                    yield 0
        finally:
            self._end = None

    def step(self, update: Callable[[], None]) -> None:
        setting, order = self.setting, self._order
        if self._end is None:
            if setting.peers.size > 1:
                what = "a step outside run.batches(): of this method not every peer takes every step"
                raise HpcsgdError(what, do="iterate over run.batches(loader)", everywhere=True)
            for _ in self.turns(setting.step + 1):
                self.step(update)
            return
        update()
        if isinstance(order, VirtualTime):
            self._due.pop(0)
            if not self._due:
                self._average(setting.step, self._members)
            return
        wait_for_compute(setting.world.device)  # "done" shall mean that it is, on a GPU too
        if joined := setting.world.progress.run(WHAT, partial(order.join, self._end)):
            self._average(*joined)
        else:
            setting.step = self._end

    def _average(self, iteration: int, members: list[int]) -> None:
        self.record.append((iteration, members))
        job = after_compute(self.setting.world.device, partial(self._mix, iteration, members))
        self.setting.world.progress.run(f"averaging in iteration {iteration}", job)
        self._exchange.settle()
        self.setting.step = iteration + 1

    def _mix(self, iteration: int, members: Sequence[int]) -> None:
        rows = metropolis_among(self._near, members)
        local = [peer for peer in members if peer in self.setting.peers.local and len(rows[peer]) > 1]
        for peer in local:
            self._exchange.show(peer, iteration, [other for other, _ in rows[peer] if other != peer])
        for peer in local:
            self._exchange.mix(peer, iteration, rows[peer])

    def state_dict(self) -> dict[str, Any]:
        """Where `run.batches` has ended: there all ranks have come to the same iteration."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order.load_state_dict(state)
        self.virtual_seconds = state.get("seconds", 0.0)
        self._exchange.clear()
