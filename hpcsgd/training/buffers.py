"""Synchronisation of buffers such as BatchNorm's running statistics."""

from __future__ import annotations

import torch
from torch import nn

from hpcsgd import collectives
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import SUMMABLE, TensorGroup
from hpcsgd.training.model_copy import copy_from_rank_0
from hpcsgd.training.virtual_nodes import VirtualNodes


@torch.no_grad()
def synchronize_buffers(world: World, model: nn.Module, nodes: VirtualNodes, treatment: str) -> None:
    """Make the buffers of all ranks equal, if `treatment` is "broadcast" or "average"; collective."""
    tensors = list(model.named_buffers())
    if treatment == "local" or not tensors:
        return
    if treatment == "average":
        nodes.average_buffers()
        floating = [(n, b) for n, b in tensors if b.dtype in SUMMABLE]
        group = TensorGroup(world, floating)
        for name, buffer in floating:
            group.views[name].copy_(buffer)
        collectives.allreduce(group)
        for name, buffer in floating:
            buffer.copy_(group.views[name])
        tensors = [(n, b) for n, b in tensors if b.dtype not in SUMMABLE]
    copy_from_rank_0(world, tensors)
    nodes.broadcast_buffers()
