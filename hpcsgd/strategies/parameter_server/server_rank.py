"""What a rank does that is a parameter server in one job with its clients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from hpcsgd.mpi.communicator import Transport
from hpcsgd.server import Policy, Server
from hpcsgd.server.metrics import figures_of
from hpcsgd.server.mpi_link import MPILink
from hpcsgd.server.utilization import Load
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import Setting

_WATCH_EVERY = 0.2  # seconds


class Serving(Strategy):
    """Serves until all clients have taken their steps; its own model takes none.

    Parameters
    ----------
    run
        The run's setting.
    policy, index, count
        See `Server`.
    transport
        Where clients are heard.
    talkers
        The ranks that talk for their groups.
    groups
        How many groups there are.
    """

    lockstep = False

    def __init__(
        self,
        run: Setting,
        policy: Policy,
        index: int,
        count: int,
        transport: Transport,
        talkers: Sequence[int],
        groups: int,
    ) -> None:
        self._run, self._groups = run, groups
        self._transport, self._talkers = transport, talkers
        self.server = Server(policy, index, count)
        self._load, self._told = Load(), Counter[int]()
        self._watched = 0.0

    def attach(self, setting: Setting) -> None:
        super().attach(setting)
        from hpcsgd.kernels.sums import server_update

        server_update.warm_up()
        for rank in self._talkers:
            name = f"rank {self._transport.ranks[rank]}"
            self.server.add(MPILink(self._transport, rank, self.server, name, setting.world.traffic))
        self._serve(lambda: self.server.rests >= len(self._talkers))

    def turns(self, end: int) -> Iterator[int]:
        server = self.server
        target = server.rests + len(self._talkers)
        server.begin((end - self._run.step) * self._groups)
        self._serve(lambda: server.rests >= target)
        self._run.step = end
        yield from ()

    def detach(self) -> None:
        self._serve(lambda: not self.server.links)

    def _serve(self, done: Callable[[], bool]) -> None:
        world = self.setting.world
        with world.progress.waiting("requests of clients"):
            while not done():
                self._hear(done)  # each request begins a new wait, with its own deadline
        world.progress.check()

    def _hear(self, done: Callable[[], bool]) -> None:
        server, heard = self.server, self.server.heard
        self.setting.world.waiter.until(
            lambda: self._look() or done() or server.heard > heard, "requests of clients"
        )

    def _look(self) -> bool:
        """Let all links move; never says that the wait is over."""
        started = time.perf_counter()
        with self.setting.world.waiter.trace.span("requests", "service"):
            moved = self.server.pump(self.server.links)
        now = time.perf_counter()
        self._load.looked(moved, now - started if moved else 0.0)
        if now - self._watched > _WATCH_EVERY:
            self._watched = now
            self.server.watch()
        return False

    def values(self, index: int) -> Tensor | None:
        """The values of a shard, where this server has it."""
        shard = self.server.shards.get(index)
        return None if shard is None else shard.centre

    def figures(self) -> dict[str, Any]:
        counting = self.server.counting
        return figures_of(self._since(counting.staleness), counting.left_out, self._load.figures())

    def _since(self, staleness: Counter[int]) -> Counter[int]:
        """What has been counted since the last call."""
        new, self._told = staleness - self._told, Counter(staleness)
        return new

    def state_dict(self) -> dict[str, Any]:
        shards = self.server.shards
        return {
            "shards": {index: shard.state_dict() for index, shard in shards.items()},
            "codes": {i: shard.codes.state_dict() for i, shard in shards.items() if shard.codes is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, shard in self.server.shards.items():
            shard.load_state_dict(state["shards"][index])
            if shard.codes is not None:
                shard.codes.load_state_dict(state["codes"].get(index, {}))
