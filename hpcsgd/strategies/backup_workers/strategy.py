"""Dynamic backup workers (cb-DyBW): an iteration averages the peers that are done, without the slowest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.staging import after_compute, wait_for_compute
from hpcsgd.errors import HpcsgdError
from hpcsgd.registry.limits import Natural
from hpcsgd.strategies import delays as delay_specs
from hpcsgd.strategies.backup_workers.agreement import (
    CLOSE_OF_ITERATION,
    Agreement,
    MessageAgreement,
    make_agreement,
)
from hpcsgd.strategies.backup_workers.closing_rule import IterationCloser, fixed_backups
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
        Virtual time at which the last iteration closed.
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
        self._iterations: VirtualTime | Agreement
        if self.delays != "none" or context.peers.per_rank > 1:
            self._iterations = VirtualTime(IterationCloser(size, edges, fixed), self._delay_samples)
        else:
            self._iterations = make_agreement(context.world, edges, fixed)
        in_real_time = not isinstance(self._iterations, VirtualTime)
        self.deterministic = not in_real_time or fixed == 0 or size == 1
        self._end: int | None = None
        self.virtual_seconds = 0.0
        self.record: deque[tuple[int, list[int]]] = deque(maxlen=10_000)

    def disconnect(self) -> None:
        super().disconnect()
        if isinstance(iterations := getattr(self, "_iterations", None), MessageAgreement):
            iterations.abandon()

    def detach(self) -> None:
        self._iterations.close()
        del self._exchange, self._iterations
        super().detach()

    def peer_schedule(self, end: int) -> Iterator[int]:
        context, iterations = self.context, self._iterations
        self._end = end
        try:
            while context.step < end:
                if isinstance(iterations, VirtualTime):
                    self._participants = iterations.next()
                    self.virtual_seconds = iterations.seconds
                    self._pending = [peer for peer in self._participants if peer in context.peers.local]
                    if not self._pending:
                        context.step += 1
                    while self._pending:
                        yield context.peers.index(self._pending[0])
                else:
                    yield 0
        finally:
            self._end = None

    def step(self, update: Callable[[], None]) -> None:
        context, iterations = self.context, self._iterations
        if self._end is None:
            if context.peers.size > 1:
                raise HpcsgdError(
                    "run.step() outside run.batches(): with backup workers peers do not take every step",
                    do="iterate over run.batches(loader)",
                    everywhere=True,
                )
            for _ in self.peer_schedule(context.step + 1):
                self.step(update)
            return
        update()
        if isinstance(iterations, VirtualTime):
            self._pending.pop(0)
            if not self._pending:
                self._average(context.step, self._participants)
            return
        wait_for_compute(context.world.device)  # a GPU may still compute the step
        if closed := context.world.progress.run(CLOSE_OF_ITERATION, partial(iterations.join, self._end)):
            self._average(*closed)
        else:
            context.step = self._end

    def _average(self, iteration: int, participants: list[int]) -> None:
        self.record.append((iteration, participants))
        job = after_compute(self.context.world.device, partial(self._mix, iteration, participants))
        self.context.world.progress.run(f"averaging in iteration {iteration}", job)
        self._exchange.flush()
        self.context.step = iteration + 1

    def _mix(self, iteration: int, participants: Sequence[int]) -> None:
        rows = metropolis_among(self._adjacency, participants)
        local = [peer for peer in participants if peer in self.context.peers.local and len(rows[peer]) > 1]
        for peer in local:
            self._exchange.publish(peer, iteration, [other for other, _ in rows[peer] if other != peer])
        for peer in local:
            self._exchange.mix(peer, iteration, rows[peer])

    def state_dict(self) -> dict[str, Any]:
        """Return the state; valid at the end of `run.batches`, where all ranks are at the same iteration."""
        return self._iterations.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._iterations.load_state_dict(state)
        self.virtual_seconds = state.get("seconds", 0.0)
        self._exchange.reset()
