"""What a training step is, with any way to communicate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.training.data import Data

Batch = tuple[Tensor, Tensor]

_TOLERANCE = 1e-4


class Trainer:
    """One contender: a model, an optimizer, and what follows each backward."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Batch],
        update: Callable[[], None],
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._batches, self._update = batches, update

    def train(self, steps: int) -> None:
        """Take some steps."""
        for _ in range(steps):
            inputs, targets = next(self._batches)
            self.optimizer.zero_grad()
            logits = self.model(inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            self._update()


def trainer(model: nn.Module, batches: Sequence[Batch]) -> Trainer:
    """Who communicates inside `model`, or not at all."""
    optimizer = sgd(model)

    def update() -> None:
        optimizer.step()

    return Trainer(model, optimizer, iter(batches), update)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every contender."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def draw(world: World, data: Data, batch: int, steps: int) -> list[Batch]:
    """As many batches as steps: a few, over and over, so that no time goes into loading."""
    generator = torch.Generator().manual_seed(world.rank)
    few = [torch.randint(len(data.train), (batch,), generator=generator) for _ in range(4)]
    loaded = [data.train.batch(indices) for indices in few]
    return [loaded[step % len(loaded)] for step in range(steps)]


@torch.no_grad()
def difference(world: World, ours: nn.Module, ddp: nn.Module) -> float:
    """The largest difference between two models' parameters, over all ranks."""
    pairs = zip(ours.parameters(), ddp.parameters(), strict=True)
    distance = max(float((a - b).abs().max()) for a, b in pairs)
    distances: list[float] = world.gather(distance, "the comparison of two models")
    return max(distances)


def check_same(spec: str, distance: float) -> None:
    """Raise `HpcsgdError` where two models differ by more than rounding."""
    if not distance <= _TOLERANCE:
        raise HpcsgdError(
            f"{spec} after one step differs between hpcsgd and DDP",
            expected=f"parameters within {_TOLERANCE}",
            got=distance,
            everywhere=True,
        )
