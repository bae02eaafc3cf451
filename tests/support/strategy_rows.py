"""Rows of the contract of strategies: each has the recursion of its models in NumPy."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcsgd import (
    ADPSGD,
    DSGD,
    LASGD,
    SGP,
    AllReduce,
    BackupWorkers,
    LocalSGD,
    ParameterServer,
    Run,
    Strategy,
    Teleportation,
    World,
    topology,
)
from hpcsgd.strategies import delays
from hpcsgd.strategies.adpsgd.pairing import BipartitePairs
from hpcsgd.strategies.teleportation.tokens import sample_holders

Array = np.ndarray
LR = 0.05
FEATURES, BATCH = 5, 6


@dataclass
class Row:
    """One strategy with one set of options.

    Attributes
    ----------
    name
        Its name in `hpcsgd.strategies.STRATEGIES`.
    make
        Makes the strategy.
    step
        Its recursion: from models (ranks, d), their gradients (ranks, d), `has_batch` of all steps up to
        this one (steps, ranks), learning rate, and number of this step from 0, to the models after it.
    reductions
        From the number of steps to that of whole-model all-reduces.
    reads
        From a peer, the number of peers and of steps to the peers whose models it reads, with repetitions.
    weights
        From the numbers of models and of steps to the weights of the models in the consensus.
    sends
        From a rank, the number of ranks and of steps to the number of whole models or gradients that it
        sends in messages, on whichever nodes.
    """

    name: str
    make: Callable[[], Strategy]
    step: Callable[[Array, Array, Array, float, int], Array]
    reductions: Callable[[int], int] = lambda steps: 0
    reads: Callable[[int, int, int], list[int]] = lambda peer, size, steps: []
    weights: Callable[[int, int], Array] = lambda size, steps: np.full(size, 1 / size)
    sends: Callable[[int, int, int], int] = lambda rank, size, steps: 0

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.make().options().items())
        return f"{self.name}({options})"


def allreduce_step(x: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
    return x - lr * g[has_batch[t]].mean(axis=0)


def local_step(period: int) -> Callable[[Array, Array, Array, float, int], Array]:
    def step(x: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
        x = x - lr * g * has_batch[t][:, None]
        if (t + 1) % period:
            return x
        own_steps = has_batch[t + 1 - period :].sum(axis=0)
        return np.tile(own_steps @ x / own_steps.sum(), (len(x), 1))

    return step


def dsgd_step(name: str, overlap: bool) -> Callable[[Array, Array, Array, float, int], Array]:
    def step(x: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
        mixing = topology.build(name, len(x)).matrix(t)
        taken = lr * g * has_batch[t][:, None]
        return mixing @ x - taken if overlap else mixing @ (x - taken)

    return step


def sources(name: str, begun_ahead: bool = False) -> Callable[[int, int, int], list[int]]:
    """Reads in a topology; one exchange more if the next one is started ahead."""

    def reads(peer: int, size: int, steps: int) -> list[int]:
        graph = topology.build(name, size)
        return [p for t in range(steps + begun_ahead) for p in graph.sources(peer, t)]

    return reads


class Push:
    """Push-sum with numerators, weights, and shares in flight, from the definition."""

    def __init__(self, name: str, overlap: bool) -> None:
        self.name, self.overlap = name, overlap

    def begin(self, size: int) -> None:
        self.weights, self.arriving_weights, self.arriving = np.ones(size), np.zeros(size), 0.0

    def pushes(self, size: int, t: int) -> Array:
        linked = (topology.build(self.name, size).matrix(t) + np.eye(size)) > 0
        return linked / linked.sum(axis=0)

    def push(self, x: Array, t: int) -> Array:
        p = self.pushes(len(x), t)
        if not self.overlap:
            self.weights = p @ self.weights
            return p @ x
        own = np.diag(np.diag(p))
        after = own @ x + self.arriving
        self.arriving = (p - own) @ x
        w, self.weights = self.weights, own @ self.weights + self.arriving_weights
        self.arriving_weights = (p - own) @ w
        np.testing.assert_allclose(self.weights.sum() + self.arriving_weights.sum(), len(x))
        return after

    def step(self, z: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
        if t == 0:
            self.begin(len(z))
        x = self.weights[:, None] * z - lr * g * has_batch[t][:, None]
        x = self.push(x, t)
        return x / self.weights[:, None]

    def consensus_weights(self, size: int, steps: int) -> Array:
        self.begin(size)
        for t in range(steps):
            self.push(np.zeros((size, 1)), t)
        return self.weights / self.weights.sum()


def sgp(name: str, overlap: bool) -> Row:
    push = Push(name, overlap)
    return Row(
        "sgp", lambda: SGP(name, overlap), push.step, reads=sources(name), weights=push.consensus_weights
    )


def drawn_pairs_step(x: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
    averages = x.copy()
    for pair in BipartitePairs(topology.build("star", len(x))).sample(0, t):
        averages[list(pair)] = averages[list(pair)].mean(axis=0)
    return averages - lr * g * has_batch[t][:, None]


def drawn_pairs_reads(peer: int, size: int, steps: int) -> list[int]:
    pairs = [
        pair for t in range(steps + 1) for pair in BipartitePairs(topology.build("star", size)).sample(0, t)
    ]
    return [other for pair in pairs if peer in pair for other in pair if other != peer]


def teleport_step(x: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
    """Four tokens on a ring; the model of an idle peer is its last one."""
    now, after = list(_holders(len(x), t)), list(_holders(len(x), t + 1))
    x = x.copy()
    x[now] -= lr * g[now]
    averages = topology.build("ring", len(now)).matrix(t) @ x[now]
    x[after] = averages
    return x


def teleport_reads(peer: int, size: int, steps: int) -> list[int]:
    graph, read = topology.build("ring", min(4, size)), []
    for t in range(steps):
        now, after = _holders(size, t), _holders(size, t + 1)
        rows = [graph.row(token) for token in range(len(after)) if after[token] == peer]
        read += [now[source] for row in rows for source, _ in row if now[source] != peer]
    return read


def teleport_weights(size: int, steps: int) -> Array:
    return np.bincount(_holders(size, steps), minlength=size) / min(4, size)


def _holders(size: int, t: int) -> tuple[int, ...]:
    return sample_holders(0, t, size, min(4, size))


def workers_of(size: int, servers: int) -> int:
    return max(1, size - servers)


def served_step(servers: int) -> Callable[[Array, Array, Array, float, int], Array]:
    """AR-SGD of the workers; the models of the servers' ranks stay as they are."""

    def step(x: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
        workers = workers_of(len(x), servers)
        return np.concatenate([x[:workers] - lr * g[:workers].mean(axis=0), x[workers:]])

    return step


def served_weights(servers: int) -> Callable[[int, int], Array]:
    def weights(size: int, steps: int) -> Array:
        workers = workers_of(size, servers)
        return np.where(np.arange(size) < workers, 1 / workers, 0.0)

    return weights


def served_sends(servers: int) -> Callable[[int, int, int], int]:
    """A worker pushes its gradient, a server replies to all workers."""

    def sends(rank: int, size: int, steps: int) -> int:
        if size == 1:
            return 0
        workers = workers_of(size, servers)
        return steps if rank < workers else steps * workers

    return sends


DELAYS = "exponential:seed=5"


def done_sets(size: int, steps: int) -> list[list[int]]:
    """Participants of each iteration on a ring, by the definition of theta(t)."""
    delay = delays.build(DELAYS).sample
    path = {(a, a + 1) for a in range(size - 1)}
    ends, numbers, unused, sets = [delay(p, 0) for p in range(size)], [0] * size, path, []
    for _ in range(steps):
        theta = min((max(ends[a], ends[b]) for a, b in unused), default=ends[0])
        done = [p for p in range(size) if ends[p] <= theta]
        unused = {edge for edge in unused if not set(edge) <= set(done)} or path
        for p in done:
            numbers[p] += 1
            ends[p] = theta + delay(p, numbers[p])
        sets.append(done)
    return sets


def links_between(size: int, done: list[int]) -> set[tuple[int, int]]:
    """The links of a ring between peers that are done."""
    return {(p, (p + 1) % size) for p in done if (p + 1) % size in done and size > 1}


def backup_step(x: Array, g: Array, has_batch: Array, lr: float, t: int) -> Array:
    done = done_sets(len(x), t + 1)[t]
    stepped = x.copy()
    stepped[done] -= lr * g[done]
    return topology.metropolis(len(x), links_between(len(x), done)) @ stepped


def backup_reads(peer: int, size: int, steps: int) -> list[int]:
    pairs = [
        {*pair}
        for done in done_sets(size, steps)
        for pair in {frozenset(p) for p in links_between(size, done)}
    ]
    return [other for pair in pairs if peer in pair for other in pair - {peer}]


ROWS = [
    Row("allreduce", AllReduce, allreduce_step, lambda steps: steps),
    *(Row("local", lambda p=p: LocalSGD(p), local_step(p), lambda steps, p=p: steps // p) for p in (1, 3)),
    *(
        # Rounds for which all ranks wait: local SGD.
        Row("lasgd", lambda p=p, m=m: LASGD(p, p, "all", m), local_step(p), lambda steps, p=p: steps // p)
        for p, m in ((1, "delta"), (3, "delta"), (3, "overwrite"))
    ),
    *(
        Row("dsgd", lambda n=n, o=o: DSGD(n, o), dsgd_step(n, o), reads=sources(n, o))
        for n, o in (("ring", False), ("one-peer-exponential", False), ("star", True))
    ),
    *(sgp(n, o) for n, o in (("one-peer-exponential", False), ("star", False), ("ring", True))),
    Row("adpsgd", lambda: ADPSGD("star", "drawn"), drawn_pairs_step, reads=drawn_pairs_reads),
    Row("backup", lambda: BackupWorkers(backups=0), dsgd_step("ring", False), reads=sources("ring")),
    Row("backup", lambda: BackupWorkers("ring", delays=DELAYS), backup_step, reads=backup_reads),
    Row("ps", lambda: ParameterServer(servers=0), allreduce_step, lambda steps: steps),
    *(
        Row(
            "ps",
            lambda m=m, n=n: ParameterServer(m, max_staleness=n),
            served_step(1),
            weights=served_weights(1),
            sends=served_sends(1),
        )
        for m, n in (("sync", None), ("async", 0))
    ),
    Row(
        "teleport",
        lambda: Teleportation(topology="ring"),
        teleport_step,
        reads=teleport_reads,
        weights=teleport_weights,
    ),
]


def regression() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, 1, dtype=torch.float64)


@cache
def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of a linear regression whose ranks have different data."""
    rng = np.random.default_rng([17, rank, step])
    x = rng.standard_normal((BATCH, FEATURES)) * (1 + 0.2 * rank)
    y = x @ np.arange(FEATURES)[:, None] + rank + 0.1 * rng.standard_normal((BATCH, 1))
    return torch.tensor(x), torch.tensor(y)


def simulate(
    row: Row,
    ranks: int,
    steps: int,
    has_batch: Callable[[int], list[bool]],
    lr: Callable[[int], float],
) -> Array:
    """Return all ranks' models (ranks, FEATURES + 1) after `steps` steps, by NumPy alone."""
    models = np.tile(vector(regression()), (ranks, 1))
    for step in range(steps):
        gradients = np.stack([gradient(models[r], *batch(r, step)) for r in range(ranks)])
        history = np.array([has_batch(s) for s in range(step + 1)])
        models = row.step(models, gradients, history, lr(step), step)
    return models


def gradient(model: Array, x: torch.Tensor, y: torch.Tensor) -> Array:
    """Return the gradient of the mean squared error."""
    features, residual = (
        x.numpy(force=True),
        x.numpy(force=True) @ model[:-1, None] + model[-1] - y.numpy(force=True),
    )
    return 2 / len(features) * np.append(features.T @ residual, residual.sum())


def vector(model: nn.Module) -> Array:
    """A model's parameters as one vector."""
    return np.concatenate([p.double().flatten().numpy(force=True) for p in model.parameters()])


def models_of(run: Run) -> Array:
    """Every rank's model, (ranks, d)."""
    return np.stack(run.world.gather(vector(run.model)))


def start(row: Row, world: World, model: nn.Module | None = None, **options: Any) -> Run:
    """A run with plain SGD."""
    model = regression() if model is None else model
    return Run(model, torch.optim.SGD(model.parameters(), LR), row.make(), comm=world, **options)


def train(run: Run, batches: Any) -> int:
    """Train on the batches of this rank; return the number of steps."""
    steps = 0
    for x, y in run.batches(batches):
        run.optimizer.zero_grad()
        nn.functional.mse_loss(run.model(x), y).backward()
        run.step()
        steps += 1
    return steps


def batches_of(rank: int, steps: int, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batch(rank, step) for step in range(first, first + steps)]


class ByIteration:
    """Loader of this rank's batches of the next `steps` iterations, those in which it takes part."""

    def __init__(self, run: Run, steps: int, first: int = 0) -> None:
        self.run, self.steps, self.offset = run, steps, first - run.steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.steps):
            yield batch(self.run.world.rank, self.offset + self.run.steps)


def same_everywhere(world: World, model: nn.Module) -> bool:
    """Return whether all ranks' parameters have the same bits."""
    own = zlib.crc32(vector(model).tobytes())
    return len(set(world.gather(own))) == 1
