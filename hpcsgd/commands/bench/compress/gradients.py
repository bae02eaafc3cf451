"""Gradients to compress: normal numbers, and those that a ResNet-18 has after a few steps of training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcsgd import collectives
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup
from hpcsgd.training.data import load
from hpcsgd.training.models import MODELS

STEPS, BATCH = 12, 16
_SHAPE, _CLASSES, _SEED = (3, 32, 32), 10, 0


def gaussian(world: World) -> list[Tensor]:
    """Independent standard normal numbers on each rank, in the shapes of a ResNet-18."""
    generator = torch.Generator().manual_seed(world.rank)
    with torch.device("meta"):
        shapes = [p.shape for p in _backwards(_model())]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def resnet18(world: World) -> list[Tensor]:
    """This rank's gradients in the last of `STEPS` steps, with `BATCH` digits a rank, all-reduced by us.

    The digits are enlarged to 3x32x32; each rank draws its own. SGD with momentum 0.9, learning rate 0.05.
    """
    torch.manual_seed(_SEED)
    model = _model()
    parameters = list(_backwards(model))
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    group = TensorGroup(world, ((str(i), p) for i, p in enumerate(parameters)))
    own: list[Tensor] = []
    for x, y in _batches(world):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        own = [p.grad.clone() for p in parameters if p.grad is not None]
        for view, gradient in zip(group.views.values(), own, strict=True):
            view.copy_(gradient)
        collectives.allreduce(group)
        for p, view in zip(parameters, group.views.values(), strict=True):
            p.grad = view.clone()
        optimizer.step()
    return own


DATA: dict[str, Callable[[World], list[Tensor]]] = {"gaussian": gaussian, "resnet18": resnet18}


def fitted(tensors: list[Tensor], elements: int | None) -> list[Tensor]:
    """The tensors, repeated or cut to so many elements."""
    parts: list[Tensor] = []
    left = sum(tensor.numel() for tensor in tensors) if elements is None else elements
    for tensor in cycle(tensors):
        if left <= 0:
            return parts
        parts.append(_first(tensor, left))
        left -= parts[-1].numel()
    return parts


def _first(tensor: Tensor, elements: int) -> Tensor:
    """So many elements of a tensor at most, in whole rows where it can be: matrices stay matrices."""
    rows = elements // math.prod(tensor.shape[1:])
    return tensor[:rows] if rows else tensor.flatten()[:elements]


def _batches(world: World) -> Iterator[tuple[Tensor, Tensor]]:
    digits = load("digits").train
    generator = torch.Generator().manual_seed(1 + world.rank)
    for _ in range(STEPS):
        x, y = digits.batch(torch.randint(len(digits), (BATCH,), generator=generator))
        x = F.interpolate(x, size=_SHAPE[1:], mode="bilinear").expand(-1, *_SHAPE)
        yield (x - x.mean()) / x.std(), y


def _model() -> nn.Module:
    return MODELS["resnet18"](shape=_SHAPE, classes=_CLASSES)


def _backwards(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters from the last to the first, as backward finds them."""
    return reversed(list(model.parameters()))
