"""Pairs of AD-PSGD: the two halves of a bipartite graph, and the schedule "drawn", equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.errors import BadOption
from hpcsgd.mpi.tasks import Steps
from hpcsgd.strategies.context import StrategyContext
from hpcsgd.strategies.step_work import StepWork
from hpcsgd.tensors.group import Bucket, TensorGroup
from hpcsgd.tensors.parameters import Parameters
from hpcsgd.topology import Topology


class BipartitePairs:
    """The two halves of a topology; every edge, of any step, joins one half to the other.

    Attributes
    ----------
    neighbours
        The neighbours of each peer, ascending.
    active
        The peers of the larger half, which request averages; if both are equally large, that of peer 0.

    Raises
    ------
    BadOption
        The graph is not bipartite.
    """

    def __init__(self, graph: Topology) -> None:
        self.neighbours: list[list[int]] = [[] for _ in range(graph.size)]
        for a, b in graph.edges():
            self.neighbours[a].append(b)
            self.neighbours[b].append(a)
        side, reached = {0: 0}, [0]
        for peer in reached:
            for other in self.neighbours[peer]:
                if other not in side:
                    side[other] = 1 - side[peer]
                    reached.append(other)
                elif side[other] == side[peer]:
                    raise BadOption(
                        f"topology {graph!r} cannot be used with AD-PSGD",
                        expected="a bipartite graph: without one, requests for averages can wait in a cycle",
                        got=f"an edge between {peer} and {other}, which are in the same half",
                        do="use topology ring with an even number of peers, star, hypercube or file",
                        everywhere=True,
                    )
        halves = [[peer for peer in range(graph.size) if side[peer] == half] for half in (0, 1)]
        self.active = max(halves, key=len)

    def sample(self, seed: int, step: int) -> list[tuple[int, int]]:
        """Return the (active, passive) pairs that average at a step, in order: one for each active peer."""
        rng = np.random.default_rng([seed, step])
        active = [self.active[i] for i in rng.permutation(len(self.active))]
        return [(peer, int(rng.choice(self.neighbours[peer]))) for peer in active if self.neighbours[peer]]


class SynchronousPairs:
    """Schedule "drawn": random pairs average one after the other, while forward and backward run."""

    def __init__(self, context: StrategyContext, parameters: Parameters, pairs: BipartitePairs) -> None:
        self._context, self._parameters, self._pairs = context, parameters, pairs
        self._replicas = [
            TensorGroup(context.world, parameters.templates, context.bucket_mib) for _ in context.peers.local
        ]
        self._exchange = Exchange(context.peers, self._replicas)
        self._averages_in_flight: StepWork | None = None

    def step(self, update: Callable[[], None]) -> None:
        context = self._context
        if context.current_peer_index == 0:
            # Before the first update: the averages are those of the models before the step.
            (self._averages_in_flight or self._start(context.step)).wait()
        if context.weight:
            update()
        if context.current_peer_index == context.peers.per_rank - 1:
            if self._pairs.sample(context.seed, context.step):
                for bucket, change in self._each_bucket():
                    bucket.flat.add_(change.flat)
            self._averages_in_flight = self._start(context.step + 1)
            self._exchange.flush()

    def total_steps(self) -> int:
        """Return the steps of all peers: each takes all."""
        return self._context.step * self._context.peers.size

    def quiesce(self) -> None:
        """Do nothing: between steps every model is complete."""

    finish = abandon = quiesce

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The averages in flight are of the models that have just been replaced.
        self._averages_in_flight = None
        self._exchange.reset()

    def close(self) -> None:
        self._context.world.progress.drain()

    def _each_bucket(self) -> Iterator[tuple[Bucket, Bucket]]:
        for group, replica in zip(self._parameters.groups, self._replicas, strict=True):
            yield from zip(group, replica, strict=True)

    def _start(self, step: int) -> StepWork:
        operation = f"averaging in pairs at step {step}"
        return StepWork(self._context.world, operation, partial(self._average, step))

    def _average(self, step: int) -> Steps[None]:
        """Write the change of each local model by the averages of a step to its replica."""
        peers = self._context.peers
        for bucket, copy in self._each_bucket():
            copy.flat.copy_(bucket.flat)
        pairs = self._pairs.sample(self._context.seed, step)
        for number, pair in enumerate(pairs):
            local = [peer for peer in pair if peer in peers.local]
            version = step * len(pairs) + number
            for peer in local:
                yield from self._exchange.publish(peer, version, [other for other in pair if other != peer])
            for peer in local:
                yield from self._exchange.mix(peer, version, [(end, 0.5) for end in sorted(pair)])
        for bucket, copy in self._each_bucket():
            copy.flat.sub_(bucket.flat)
