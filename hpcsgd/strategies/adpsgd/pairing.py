"""Averaging in pairs: the two halves of a graph, and a schedule of pairs that all ranks draw alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from hpcsgd.collectives.neighbour_exchange import Exchange
from hpcsgd.collectives.staging import after_compute
from hpcsgd.errors import BadOption
from hpcsgd.mpi.progress import Work
from hpcsgd.strategies.context import Setting
from hpcsgd.tensors.group import Bucket, TensorGroup
from hpcsgd.tensors.parameters import Parameters
from hpcsgd.topology import Topology


class Pairs:
    """The two halves of a topology, of which every edge joins the one to the other.

    Parameters
    ----------
    graph
        Its edges over a whole period count.

    Attributes
    ----------
    neighbours
        Of each peer, ascending.
    active
        The larger half, whose peers ask for an average; where both are as large, that of peer 0.

    Raises
    ------
    BadOption
        Where there are no such halves.
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
                        f"{graph!r} has no two halves for AD-PSGD: {peer} and {other} are on the same side",
                        expected="a bipartite graph, so that who asks never waits for who asks",
                        do="use star or file, hypercube, or ring with an even number of peers",
                        everywhere=True,
                    )
        halves = [[peer for peer in range(graph.size) if side[peer] == half] for half in (0, 1)]
        self.active = max(halves, key=len)

    def drawn(self, seed: int, step: int) -> list[tuple[int, int]]:
        """The pairs that average at a step, in this order: each active peer with one of its neighbours."""
        rng = np.random.default_rng([seed, step])
        asking = [self.active[i] for i in rng.permutation(len(self.active))]
        return [(peer, int(rng.choice(self.neighbours[peer]))) for peer in asking if self.neighbours[peer]]


class Drawn:
    """Pairs that are drawn for each step and average one after the other, while forward and backward run.

    Parameters
    ----------
    setting
        The run's.
    parameters
        The models.
    pairs
        Who can average with whom.
    """

    def __init__(self, setting: Setting, parameters: Parameters, pairs: Pairs) -> None:
        self._setting, self._parameters, self._pairs = setting, parameters, pairs
        trained = [(name, p) for name, p in setting.parameters if p.requires_grad]
        self._replicas = [
            TensorGroup(setting.world, trained, setting.bucket_mib) for _ in setting.peers.local
        ]
        self._exchange = Exchange(setting.peers, self._replicas)
        self._ahead: Work | None = None

    def step(self, update: Callable[[], None]) -> None:
        setting = self._setting
        if setting.turn == 0:
            # Before the first update: the averages are of the models as they still are.
            (self._ahead or self._begin(setting.step)).wait()
        if setting.weight:
            update()
        if setting.turn == setting.peers.each - 1:
            if self._pairs.drawn(setting.seed, setting.step):
                for bucket, change in self._each_bucket():
                    bucket.flat.add_(change.flat)
            self._ahead = self._begin(setting.step + 1)
            self._exchange.settle()

    def settle(self) -> None:
        """Nothing is ever half done between steps."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # What was averaged ahead was of the models before.
        self._ahead = None
        self._exchange.clear()

    def close(self) -> None:
        self._setting.world.progress.drain()

    def _each_bucket(self) -> Iterator[tuple[Bucket, Bucket]]:
        for group, replica in zip(self._parameters.groups, self._replicas, strict=True):
            yield from zip(group, replica, strict=True)

    def _begin(self, step: int) -> Work:
        world = self._setting.world
        job = after_compute(world.device, partial(self._average, step))
        return world.progress.submit(f"averaging in pairs at step {step}", job)

    def _average(self, step: int) -> None:
        """Leave in each replica what the averages of a step change in the model."""
        peers = self._setting.peers
        for bucket, copy in self._each_bucket():
            copy.flat.copy_(bucket.flat)
        pairs = self._pairs.drawn(self._setting.seed, step)
        for number, pair in enumerate(pairs):
            here = [peer for peer in pair if peer in peers.local]
            version = step * len(pairs) + number
            for peer in here:
                self._exchange.show(peer, version, [other for other in pair if other != peer])
            for peer in here:
                self._exchange.mix(peer, version, [(end, 0.5) for end in sorted(pair)])
        for bucket, copy in self._each_bucket():
            copy.flat.sub_(bucket.flat)
