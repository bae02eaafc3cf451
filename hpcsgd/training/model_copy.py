"""The copy of the model of rank 0 to all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcsgd import collectives
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup


@torch.no_grad()
def copy_from_rank_0(world: World, tensors: list[tuple[str, Tensor]]) -> None:
    """Overwrite (name, tensor) pairs with those of rank 0; collective."""
    if world.size == 1:
        return
    group = TensorGroup(world, [(n, t) for n, t in tensors if t.numel()])
    for name, tensor in tensors:
        if tensor.numel():
            group.views[name].copy_(tensor)
    collectives.broadcast(group)
    for name, tensor in tensors:
        if tensor.numel():
            tensor.copy_(group.views[name])
