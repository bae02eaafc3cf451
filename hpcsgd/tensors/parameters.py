"""The parameters of a model as a tensor group, written by both the optimizer and the collectives."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcsgd.mpi.world import World
from hpcsgd.tensors.gradients import Named
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, TensorGroup


class Parameters:
    """Moves the trained parameters into a tensor group; module and optimizer keep the same parameter objects.

    Parameters
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs, without duplicates; those that require no gradient are not moved.
    bucket_mib
        Size of a bucket in MiB. Default 4.
    copies
        Number of groups, with equal initial values; the module uses one at a time. Default 1.

    Attributes
    ----------
    groups
        All groups.
    group
        The group that the module uses; initially the first.
    """

    def __init__(
        self, world: World, parameters: Named, bucket_mib: float = DEFAULT_BUCKET_MIB, copies: int = 1
    ) -> None:
        self._parameters = [(name, p) for name, p in parameters if p.requires_grad]
        self.groups = [TensorGroup(world, self._parameters, bucket_mib) for _ in range(copies)]
        for group in self.groups:
            for name, parameter in self._parameters:
                group.views[name].copy_(parameter.data)
        self.select(0)

    def select(self, index: int) -> None:
        """Make the module use group number `index`."""
        self.group = self.groups[index]
        for name, parameter in self._parameters:
            parameter.data = self.group.views[name]

    def release(self) -> None:
        """Copy every parameter to memory of its own."""
        for _, parameter in self._parameters:
            parameter.data = parameter.data.clone()

    def copy(self) -> list[Tensor]:
        """Return a copy of the values, one flat tensor a bucket."""
        return [bucket.flat.clone() for bucket in self.group]

    def restore(self, values: list[Tensor]) -> None:
        """Restore the values of `copy`."""
        for bucket, value in zip(self.group, values, strict=True):
            bucket.flat.copy_(value)

    def squared_distance(self, values: list[Tensor]) -> float:
        """Return the squared 2-norm, in float64, of the difference between the model and `values`."""
        pairs = zip(self.group, values, strict=True)
        return sum(float(torch.linalg.vector_norm((b.flat - v).double()) ** 2) for b, v in pairs)
