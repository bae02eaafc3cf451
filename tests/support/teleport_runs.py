"""Runs of TELEPORTATION on a linear regression, and their expected models by NumPy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hpcsgd import Run, Teleportation, World, topology
from hpcsgd.strategies.teleportation.tokens import sample_holders
from tests.support.devices import on_device

LR, MOMENTUM, FEATURES, BATCH = 0.05, 0.9, 3, 4
Batch = tuple[torch.Tensor, torch.Tensor]


class Slowing(torch.optim.SGD):
    """SGD whose rate falls with each parameter's steps, a Python number; `grow` adds a state entry."""

    grow = False

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state.setdefault("count", 0)
                state["nothing"] = None
                state["odd"] = state["count"] % 2 == 1
                parameter.grad.mul_((2 if state["odd"] else 1) / (1 + state["count"]))
                state["count"] += 1
                if self.grow:
                    state["more"] = 1
        super().step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "plain": lambda p: torch.optim.SGD(p, LR),
    "momentum": lambda p: torch.optim.SGD(p, LR, momentum=MOMENTUM),
    "dampened": lambda p: torch.optim.SGD(p, LR, momentum=MOMENTUM, dampening=0.5),  # its first step is not
    "slowing": lambda p: Slowing(p, LR),
    "adam": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


class Regression(nn.Module):
    """A linear regression, and a parameter that only the data of some peers use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(FEATURES, 1, dtype=torch.float64)
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out + self.shift if x[0, 0] > 100 else out


def data(peer: int) -> list[Batch]:
    """Return two or three batches; those of two of three peers have a marked first feature."""
    rng = np.random.default_rng([5, peer])
    x = rng.standard_normal((2 + peer % 2, BATCH, FEATURES))
    y = x @ np.arange(FEATURES)[:, None] + peer
    x[:, 0, 0] = 101 if peer % 3 else 0
    y[:, 0, 0] = 100
    return [
        (on_device(torch.from_numpy(a)), on_device(torch.from_numpy(b)))
        for a, b in zip(x / 10, y / 10, strict=True)
    ]


def batch(peer: int, visit: int) -> Batch:
    batches = data(peer)
    return batches[visit % len(batches)]


def begin(
    world: World,
    strategy: Teleportation,
    optimizer: str = "momentum",
    nodes: int | None = None,
    seed: int = 3,
) -> Run:
    model = Regression()
    made = OPTIMIZERS[optimizer](model.parameters())
    return Run(model, made, strategy, comm=world, virtual_nodes=nodes, seed=seed)


def loaders(run: Run) -> Any:
    own = [data(peer) for peer in run.peers]
    return own if len(own) > 1 else own[0]


def train(run: Run, steps: int | None, batches: Any = None) -> int:
    taken = 0
    for x, y in run.batches(loaders(run) if batches is None else batches, steps=steps):
        run.zero_grad()
        nn.functional.mse_loss(run.model(x), y).backward()
        run.step()
        taken += 1
    return taken


def vector(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().flatten().numpy(force=True) for p in model.parameters()])


def tokens(run: Run) -> np.ndarray:
    """Return the model of each token, (tokens, d)."""
    strategy = run.strategy
    assert isinstance(strategy, Teleportation)
    own = {peer: vector(run.model).copy() for peer in run.each_peer()}
    models = {peer: model for some in run.world.gather(own) for peer, model in some.items()}
    return np.stack([models[peer] for peer in strategy.tokens.holders(run.steps)])


def gradient(model: np.ndarray, batch: Batch) -> np.ndarray:
    """Return the gradient of the mean squared error by shift, weights and bias."""
    x, y = (part.numpy(force=True) for part in batch)
    shifted = x[0, 0] > 100
    residual = x @ model[1 : 1 + FEATURES] + model[1 + FEATURES] + shifted * model[0] - y[:, 0]
    return 2 / BATCH * np.concatenate([[shifted * residual.sum()], x.T @ residual, [residual.sum()]])


def simulate(size: int, active: int, name: str, momentum: float, steps: int) -> np.ndarray:
    """Compute all tokens by NumPy alone; the momentum moves with its token."""
    graph, visits = topology.build(name, active), Counter[int]()
    x = np.tile(vector(Regression()), (active, 1))
    velocity = np.zeros_like(x)
    for step in range(steps):
        holders = sample_holders(3, step, size, active)
        for token, peer in enumerate(holders):
            velocity[token] = momentum * velocity[token] + gradient(x[token], batch(peer, visits[peer]))
            visits[peer] += 1
        x = graph.matrix(step) @ (x - LR * velocity)
    return x
