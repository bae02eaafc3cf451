"""Dynamic backup workers (cb-DyBW): an iteration averages the peers that are done, without the slowest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.staging import after_compute
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.tasks import Steps
from hpcsgd.registry.limits import Natural
from hpcsgd.strategies import delays as delay_specs
from hpcsgd.strategies.backup_workers.closing_rule import IterationCloser, fixed_backups
from hpcsgd.strategies.backup_workers.real_time import RealTime
from hpcsgd.strategies.backup_workers.virtual_time import VirtualTime
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.replicas import ReplicaStrategy
from hpcsgd.topology import TopologySpec, build
from hpcsgd.topology.graphs import adjacency
from hpcsgd.topology.mixing import metropolis_among


@dataclass(eq=False, repr=False)
class BackupWorkers(ReplicaStrategy):
    """Decentralised SGD whose iterations wait only for the fastest peers (arXiv 2102.06280).

    cb-DyBW with the DTUR rule (Xiong, Yan, Singh, Li, arXiv 2102.06280): y_i = x_i - lr g_i(x_i), and an
    iteration closes once both ends of an edge are done that is still unused in the current epoch, of a set P
    of edges that connects all peers; when all of P are used, the next epoch begins. The peers that are not
    done are the backup workers of the iteration. Our reading: all peers that are done at that instant take
    part, with the edges of the topology between them and Metropolis weights; P is a path if there is one,
    else a tree; a peer that is not done continues with its own model and joins the iteration that is open
    when it finishes. A topology that varies is used with the edges of all its steps.

    The strategy is asynchronous: take batches from `run.batches`. A gradient that is done only after the last
    requested iteration has closed becomes a step without averaging. Optimizer state stays local.

    Parameters
    ----------
    topology
        NAME or NAME:key=value+key=value of `hpcsgd.topology`. Default "ring".
    backups
        "dynamic" (default), or the number of peers for which no iteration waits, 0 (cb-Full of the paper)
        to the number of peers - 2.
    delays
        "none" (default): real time. Else virtual time: gradients take the times of NAME or
        NAME:key=value+key=value of `hpcsgd.strategies.delays`, and the participants of all iterations follow
        from these alone. With virtual nodes time is always virtual; then all peers take part if "none".

    Attributes
    ----------
    record
        (iteration, participants) of the last 10,000 iterations of this rank.
    virtual_seconds
        Virtual time at which the last iteration of the last loop closed; 0 in real time.
    """

    title = "dynamic backup workers"
    accepts_virtual_nodes = True
    synchronous = False

    topology: TopologySpec = "ring"
    backups: Literal["dynamic"] | Natural = "dynamic"
    delays: delay_specs.DelaysSpec = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._delay_samples = delay_specs.build(self.delays)

    def clamp_to(self, peers: int) -> None:
        if isinstance(self.backups, int):
            self.backups = max(0, min(self.backups, peers - 2))
        self._delay_samples.clamp_to(peers)

    def attach(self, context: StrategyContext) -> None:
        graph = context.world.collectively(lambda: build(self.topology, context.peers.size))
        size, edges = graph.size, graph.spanning()
        fixed = fixed_backups(self.backups, size)
        self._delay_samples.check_peers(size)
        super().attach(context)
        self._adjacency = adjacency(size, graph.edges())
        self._exchange = Exchange(context.peers, self.parameters.groups)
        self._iterations: VirtualTime | RealTime
        is_virtual = self.delays != "none" or context.peers.per_rank > 1
        if is_virtual:
            closer = IterationCloser(size, edges, fixed)
            self._iterations = VirtualTime(closer, self._delay_samples)
        else:
            self._iterations = RealTime(context.world, edges, fixed)
        self.deterministic = is_virtual or fixed == 0 or size == 1
        self._end: int | None = None
        self.virtual_seconds = 0.0
        self.record: deque[tuple[int, list[int]]] = deque(maxlen=10_000)

    def disconnect(self) -> None:
        super().disconnect()
        if hasattr(self, "_iterations"):
            self._iterations.abandon()

    def detach(self) -> None:
        self._iterations.close()
        del self._exchange, self._iterations
        super().detach()

    def peer_schedule(self, end: int) -> Iterator[int]:
        self._end = end
        try:
            yield from self._iterations.schedule(self.context, end)
        finally:
            self._end, self.virtual_seconds = None, self._iterations.seconds

    def step(self, update: Callable[[], None]) -> None:
        if self._end is None:
            self._step_alone(update)
            return
        update()
        if closed := self._iterations.end_step(self.context, self._end):
            self._average(*closed)

    def _step_alone(self, update: Callable[[], None]) -> None:
        """Take a step outside of a loop, which one peer alone can."""
        context = self.context
        if context.peers.size > 1:
            raise HpcsgdError(
                "run.step() outside run.batches(): with backup workers peers do not take every step",
                do="iterate over run.batches(loader)",
                everywhere=True,
            )
        for _ in self.peer_schedule(context.step + 1):
            self.step(update)

    def _average(self, iteration: int, participants: list[int]) -> None:
        self.record.append((iteration, participants))
        job = after_compute(self.context.world.device, partial(self._mix, iteration, participants))
        self.context.world.progress.run(f"averaging in iteration {iteration}", job)
        self._exchange.flush()
        self.context.step = iteration + 1

    def _mix(self, iteration: int, participants: Sequence[int]) -> Steps[None]:
        rows = metropolis_among(self._adjacency, participants)
        local = [peer for peer in participants if peer in self.context.peers.local and len(rows[peer]) > 1]
        for peer in local:
            yield from self._exchange.publish(
                peer, iteration, [other for other, _ in rows[peer] if other != peer]
            )
        for peer in local:
            yield from self._exchange.mix(peer, iteration, rows[peer])

    def state_dict(self) -> dict[str, Any]:
        """Return the state; valid at the end of `run.batches`, where all ranks are at the same iteration."""
        return self._iterations.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._iterations.load_state_dict(state)
        self.virtual_seconds = self._iterations.seconds
        self._exchange.reset()
