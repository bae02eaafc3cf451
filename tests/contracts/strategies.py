"""What every strategy must do; a new one adds a row with its recursion in NumPy."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcsgd import DSGD, AllReduce, LocalSGD, Run, Strategy, World, topology

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
    step
        Its recursion: models (ranks, d), their gradients (ranks, d), which ranks had data in each
        step up to this one (steps, ranks), the learning rate, and the number of this step from 0, to
        the models after it.
    reductions
        How many whole-model all-reduces it takes for so many steps.
    reads
        For a peer, the number of peers, and so many steps: whose models it reads, each as often as it does.
    """

    name: str
    make: Callable[[], Strategy]
    step: Callable[[Array, Array, Array, float, int], Array]
    reductions: Callable[[int], int] = lambda steps: 0
    reads: Callable[[int, int, int], list[int]] = lambda peer, size, steps: []

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.make().options().items())
        return f"{self.name}({options})"


def allreduce_step(x: Array, g: Array, having: Array, lr: float, t: int) -> Array:
    return x - lr * g[having[t]].mean(axis=0)


def local_step(period: int) -> Callable[[Array, Array, Array, float, int], Array]:
    def step(x: Array, g: Array, having: Array, lr: float, t: int) -> Array:
        x = x - lr * g * having[t][:, None]
        if (t + 1) % period:
            return x
        own_steps = having[t + 1 - period :].sum(axis=0)
        return np.tile(own_steps @ x / own_steps.sum(), (len(x), 1))

    return step


def dsgd_step(name: str, overlap: bool) -> Callable[[Array, Array, Array, float, int], Array]:
    def step(x: Array, g: Array, having: Array, lr: float, t: int) -> Array:
        mixing = topology.build(name, len(x)).matrix(t)
        taken = lr * g * having[t][:, None]
        return mixing @ x - taken if overlap else mixing @ (x - taken)

    return step


def sources(name: str, begun_ahead: bool = False) -> Callable[[int, int, int], list[int]]:
    """What is read in a topology; one exchange more where the next one begins before it is asked for."""

    def reads(peer: int, size: int, steps: int) -> list[int]:
        graph = topology.build(name, size)
        return [p for t in range(steps + begun_ahead) for p in graph.sources(peer, t)]

    return reads


ROWS = [
    Row("allreduce", AllReduce, allreduce_step, lambda steps: steps),
    *(Row("local", lambda p=p: LocalSGD(p), local_step(p), lambda steps, p=p: steps // p) for p in (1, 3)),
    *(
        Row("dsgd", lambda n=n, o=o: DSGD(n, o), dsgd_step(n, o), reads=sources(n, o))
        for n, o in (("ring", False), ("one-peer-exponential", False), ("star", True))
    ),
]


def regression() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, 1, dtype=torch.float64)


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear regression whose ranks have different data."""
    rng = np.random.default_rng([17, rank, step])
    x = rng.standard_normal((BATCH, FEATURES)) * (1 + 0.2 * rank)
    y = x @ np.arange(FEATURES)[:, None] + rank + 0.1 * rng.standard_normal((BATCH, 1))
    return torch.from_numpy(x), torch.from_numpy(y)


def simulate(
    row: Row,
    ranks: int,
    steps: int,
    having: Callable[[int], list[bool]],
    lr: Callable[[int], float],
) -> Array:
    """All ranks' models (ranks, FEATURES + 1) after so many steps, by NumPy alone."""
    models = np.tile(vector(regression()), (ranks, 1))
    for step in range(steps):
        gradients = np.stack([gradient(models[r], *batch(r, step)) for r in range(ranks)])
        history = np.array([having(s) for s in range(step + 1)])
        models = row.step(models, gradients, history, lr(step), step)
    return models


def gradient(model: Array, x: torch.Tensor, y: torch.Tensor) -> Array:
    """Of the mean squared error."""
    features, residual = x.numpy(), x.numpy() @ model[:-1, None] + model[-1] - y.numpy()
    return 2 / len(features) * np.append(features.T @ residual, residual.sum())


def vector(model: nn.Module) -> Array:
    """A model's parameters as one vector."""
    return np.concatenate([p.detach().double().flatten().numpy() for p in model.parameters()])


def models_of(run: Run) -> Array:
    """Every rank's model, (ranks, d)."""
    return np.stack(run.world.gather(vector(run.model)))


def start(row: Row, world: World, model: nn.Module | None = None, **options: Any) -> Run:
    """A run with plain SGD."""
    model = regression() if model is None else model
    return Run(model, torch.optim.SGD(model.parameters(), LR), row.make(), comm=world, **options)


def train(run: Run, batches: Any) -> int:
    """The number of steps that it took to train on the batches of this rank."""
    steps = 0
    for x, y in run.batches(batches):
        run.optimizer.zero_grad()
        nn.functional.mse_loss(run.model(x), y).backward()
        run.step()
        steps += 1
    return steps


def batches_of(rank: int, steps: int, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batch(rank, step) for step in range(first, first + steps)]


def same_everywhere(world: World, model: nn.Module) -> bool:
    """Whether all ranks' parameters have the same bits."""
    mine = zlib.crc32(vector(model).tobytes())
    return len(set(world.gather(mine))) == 1
