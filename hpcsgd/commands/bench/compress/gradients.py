"""Gradients to compress: standard normal samples, and gradients of a ResNet-18 after a few training steps."""

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
    """Independent standard normal samples on each rank, in the shapes of a ResNet-18."""
    generator = torch.Generator(device="cpu").manual_seed(world.rank)
    with torch.device("meta"):
        shapes = [p.shape for p in _reversed_parameters(_model())]
    return [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]


def resnet18(world: World) -> list[Tensor]:
    """This rank's gradients in the last of `STEPS` training steps, before the all-reduce of that step.

    `BATCH` digits per rank and step, enlarged to 3x32x32, different on each rank; all-reduce by hpcsgd; SGD
    with momentum 0.9 and learning rate 0.05.
    """
    torch.manual_seed(_SEED)
    model = _model()
    parameters = list(_reversed_parameters(model))
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    group = TensorGroup(world, ((str(i), p) for i, p in enumerate(parameters)))
    gradients: list[Tensor] = []
    for x, y in _batches(world):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        for view, gradient in zip(group.views.values(), gradients, strict=True):
            view.copy_(gradient)
        collectives.allreduce(group)
        for p, view in zip(parameters, group.views.values(), strict=True):
            p.grad = view.clone()
        optimizer.step()
    return gradients


DATA: dict[str, Callable[[World], list[Tensor]]] = {"gaussian": gaussian, "resnet18": resnet18}


def resize(tensors: list[Tensor], elements: int | None) -> list[Tensor]:
    """The tensors, repeated or cut to `elements` elements in total; None leaves them."""
    resized: list[Tensor] = []
    remaining = sum(tensor.numel() for tensor in tensors) if elements is None else elements
    for tensor in cycle(tensors):
        if remaining <= 0:
            return resized
        resized.append(_cut(tensor, remaining))
        remaining -= resized[-1].numel()
    return resized


def _cut(tensor: Tensor, elements: int) -> Tensor:
    """At most `elements` elements of a tensor; whole rows where possible, so that matrices stay matrices."""
    rows = elements // math.prod(tensor.shape[1:])
    return tensor[:rows] if rows else tensor.flatten()[:elements]


def _batches(world: World) -> Iterator[tuple[Tensor, Tensor]]:
    digits = load("digits").train
    generator = torch.Generator(device="cpu").manual_seed(1 + world.rank)
    for _ in range(STEPS):
        x, y = digits.batch(torch.randint(len(digits), (BATCH,), generator=generator, device="cpu"))
        x = F.interpolate(x, size=_SHAPE[1:], mode="bilinear").expand(-1, *_SHAPE)
        yield (x - x.mean()) / x.std(), y


def _model() -> nn.Module:
    return MODELS["resnet18"](shape=_SHAPE, classes=_CLASSES)


def _reversed_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters from last to first: the order in which backward computes their gradients."""
    return reversed(list(model.parameters()))
