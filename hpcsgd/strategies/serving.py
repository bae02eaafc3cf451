"""What a rank does that is a parameter server in one job with its clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hpcsgd.links import MPILink
from hpcsgd.server import Policy, Server
from hpcsgd.strategies.base import Setting, Strategy
from hpcsgd.transport import Transport

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
        self._busy = self._spent = 0.0
        self._looks = self._found = 0
        self._watched = 0.0

    def attach(self, setting: Setting) -> None:
        super().attach(setting)
        from hpcsgd.kernels import centre

        centre.warm_up()
        for rank in self._talkers:
            name = f"rank {self._transport.ranks[rank]}"
            self.server.add(MPILink(self._transport, rank, self.server, name, setting.world.traffic))
        self._serve(lambda: self.server.rests >= len(self._talkers))

    def turns(self, end: int) -> Iterator[int]:
        server, started = self.server, time.perf_counter()
        target = server.rests + len(self._talkers)
        server.begin((end - self._run.step) * self._groups)
        self._serve(lambda: server.rests >= target)
        self._spent += time.perf_counter() - started
        self._run.step = end
        yield from ()

    def detach(self) -> None:
        self._serve(lambda: not self.server.links)

    def _serve(self, done: Callable[[], bool]) -> None:
        world, server = self.setting.world, self.server
        with world.progress.waiting():
            while not done():
                heard = server.heard
                world.waiter.until(lambda: done() or self._look() or server.heard > heard, "requests of clients")  # noqa: B023
        world.progress.check()

    def _look(self) -> bool:
        """Let all links move; never says that the wait is over."""
        started = time.perf_counter()
        moved = self.server.pump(self.server.links)
        while moved:
            self._looks += 1
            self._found += moved
            moved = self.server.pump(self.server.links)
        now = time.perf_counter()
        self._busy += now - started
        if now - self._watched > _WATCH_EVERY:
            self._watched = now
            self.server.watch()
        return False

    def values(self, index: int) -> Tensor | None:
        """The values of a shard, where this server has it."""
        shard = self.server.shards.get(index)
        return None if shard is None else shard.centre

    def figures(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"shards": {index: shard.state_dict() for index, shard in self.server.shards.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, shard in self.server.shards.items():
            shard.load_state_dict(state["shards"][index])
