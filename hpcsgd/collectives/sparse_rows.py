"""Sums of sparse gradients: the rows of all ranks are gathered, for their positions differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcsgd.mpi.world import World


def sum_rows(world: World, gradients: Sequence[Tensor | None], scale: float) -> list[Tensor | None]:
    """Return `scale` times the sum over all ranks of each sparse gradient, in rank order; collective.

    Parameters
    ----------
    world
        The ranks.
    gradients
        Sparse COO tensors with rows as values; None counts as zeros.
    scale
        Factor of the sums.

    Returns
    -------
    list
        Coalesced sparse tensors; None where no rank has a gradient.
    """
    local = [None if each is None else _parts(each) for each in gradients]
    name = f"all-gather of sparse gradients at step {world.activity.step}"
    rows = world.progress.run(name, lambda: world.all.gather_objects(local, name))
    return [
        _sum([row[index] for row in rows if row[index] is not None], scale, world.device)
        for index in range(len(gradients))
    ]


def _parts(gradient: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    gradient = gradient.detach().coalesce()
    return gradient.indices().cpu(), gradient.values().cpu(), gradient.size()


def _sum(parts: list[tuple[Tensor, Tensor, torch.Size]], scale: float, device: torch.device) -> Tensor | None:
    if not parts:
        return None
    indices = torch.cat([each[0] for each in parts], dim=1).to(device)
    values = torch.cat([each[1] for each in parts]).to(device)
    total = torch.sparse_coo_tensor(indices, values, parts[0][2], check_invariants=False)
    return total.coalesce().mul_(scale)
