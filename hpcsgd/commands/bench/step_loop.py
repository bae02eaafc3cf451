"""The training loop of the step benchmarks, for any method of communication."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcsgd.commands.bench import output
from hpcsgd.mpi.world import World
from hpcsgd.training.data.base import Data

Batch = tuple[Tensor, Tensor]

#: Largest difference after one step. A weight of 1 in bfloat16 has neighbours at 2**-8 and 2**-7, and sums of
#: gradients that are rounded in another order may end at either.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}


class StepLoop:
    """The training loop of one contender; `update` is called after each backward pass."""

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
        """Take `steps` steps."""
        for _ in range(steps):
            inputs, targets = next(self._batches)
            self.optimizer.zero_grad()
            logits = self.model(inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            self._update()


def plain_loop(model: nn.Module, batches: Sequence[Batch]) -> StepLoop:
    """A loop without communication of its own: for a model that communicates in backward, or not at all."""
    optimizer = sgd(model)

    def update() -> None:
        optimizer.step()

    return StepLoop(model, optimizer, iter(batches), update)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all contenders: SGD with momentum 0.9 and learning rate 0.01."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def make_batches(
    world: World, data: Data, batch: int, steps: int, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """Return a batch per step on the device: four batches, repeated, so that loading takes no time.

    Images have the given dtype, by default float32; tokens and labels keep theirs.
    """
    generator = torch.Generator(device="cpu").manual_seed(world.rank)
    samples = [torch.randint(len(data.train), (batch,), generator=generator, device="cpu") for _ in range(4)]
    loaded = []
    for inputs, targets in map(data.train.batch, samples):
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        loaded.append((inputs.to(world.device), targets.to(world.device)))
    return [loaded[step % len(loaded)] for step in range(steps)]


@torch.no_grad()
def max_difference(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between the parameters of two models."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


def check_equal(world: World, spec: str, distance: float, dtype: torch.dtype) -> None:
    """Raise `HpcsgdError` on all ranks if two models of this dtype differ by more than rounding."""
    limit = _TOLERANCES[dtype]
    expected = f"the parameters of DDP within {limit}"
    output.check(world, f"a step of {spec}", distance <= limit, expected, distance)
