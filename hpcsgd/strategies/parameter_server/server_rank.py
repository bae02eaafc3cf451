"""Role of a rank that is a parameter server in the same job as its clients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from hpcsgd.diagnostics.activity import phase
from hpcsgd.mpi.communicator import Communicator
from hpcsgd.server import Policy, Server
from hpcsgd.server.metrics import Utilization, server_metrics
from hpcsgd.server.mpi_link import MPILink
from hpcsgd.strategies.base import Strategy
from hpcsgd.strategies.context import StrategyContext

_LEASE_CHECK_INTERVAL = 0.2  # seconds


class ServerRole(Strategy):
    """Serves requests until all clients have taken their steps; its own model takes none.

    Parameters
    ----------
    run
        Context of the whole run.
    policy, index, count
        See `Server`.
    communicator, number
        See `MPILink`.
    gateways
        Ranks of the groups' gateways, which connect to this server.
    groups
        Number of groups.
    """

    synchronous = False

    def __init__(
        self,
        run: StrategyContext,
        policy: Policy,
        index: int,
        count: int,
        communicator: Communicator,
        number: int,
        gateways: Sequence[int],
        groups: int,
    ) -> None:
        self._run, self._groups = run, groups
        self._communicator, self._number, self._gateways = communicator, number, gateways
        self.server = Server(policy, index, count)
        self._utilization, self._reported_staleness = Utilization(), Counter[int]()
        self._leases_checked_at = 0.0

    def attach(self, context: StrategyContext) -> None:
        super().attach(context)
        from hpcsgd.kernels.sums import server_update

        with phase("compiling kernels"):
            server_update.warm_up()
        communicator, traffic = self._communicator, context.world.traffic
        for rank in self._gateways:
            name = f"rank {communicator.ranks[rank]}"
            self.server.add_link(MPILink(communicator, rank, self._number, self.server, name, traffic))
        self._serve(lambda: self.server.pauses >= len(self._gateways))

    def peer_schedule(self, end: int) -> Iterator[int]:
        server = self.server
        target = server.pauses + len(self._gateways)
        server.start_steps((end - self._run.step) * self._groups)
        self._serve(lambda: server.pauses >= target)
        self._run.step = end
        yield from ()

    def detach(self) -> None:
        self._serve(lambda: not self.server.links)

    def _serve(self, done: Callable[[], bool]) -> None:
        world = self.context.world
        with world.progress.waiting("requests of clients"):
            while not done():
                self._wait_for_message(done)  # each request begins a new wait, with its own deadline
        world.progress.check()

    def _wait_for_message(self, done: Callable[[], bool]) -> None:
        server, received = self.server, self.server.messages_received
        self.context.world.waiter.until(
            lambda: self._poll() or done() or server.messages_received > received, "requests of clients"
        )

    def _poll(self) -> bool:
        """Pump all links and check the leases; returns False, as part of a wait condition."""
        started = time.perf_counter()
        with self.context.world.waiter.tracer.span("requests", "service"):
            moved = self.server.pump(self.server.links)
        now = time.perf_counter()
        self._utilization.record_poll(moved, now - started if moved else 0.0)
        if now - self._leases_checked_at > _LEASE_CHECK_INTERVAL:
            self._leases_checked_at = now
            self.server.check_leases()
        return False

    def values(self, index: int) -> Tensor | None:
        """Values of a shard; None if it is on another server."""
        shard = self.server.shards.get(index)
        return None if shard is None else shard.centre

    def metrics(self) -> dict[str, Any]:
        aggregator = self.server.aggregator
        staleness = self._new_staleness(aggregator.staleness)
        return server_metrics(staleness, aggregator.dropped, self._utilization.metrics())

    def _new_staleness(self, staleness: Counter[int]) -> Counter[int]:
        """Histogram since the last call."""
        new, self._reported_staleness = staleness - self._reported_staleness, Counter(staleness)
        return new

    def state_dict(self) -> dict[str, Any]:
        shards, aggregator = self.server.shards, self.server.aggregator
        new = aggregator.staleness - self._reported_staleness
        return {
            "pushes": {"staleness": dict(new), "dropped": aggregator.dropped},
            "shards": {index: shard.state_dict() for index, shard in shards.items()},
            "codes": {i: shard.codec.state_dict() for i, shard in shards.items() if shard.codec is not None},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        aggregator, pushes = self.server.aggregator, state.get("pushes", {})  # older checkpoints have none
        aggregator.staleness.clear()
        aggregator.staleness.update(pushes.get("staleness", {}))
        aggregator.dropped, self._reported_staleness = pushes.get("dropped", 0), Counter()
        for index, shard in self.server.shards.items():
            shard.load_state_dict(state["shards"][index])
            if shard.codec is not None:
                shard.codec.load_state_dict(state["codes"].get(index, {}))
