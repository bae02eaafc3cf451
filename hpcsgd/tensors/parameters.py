"""The parameters of a model as a tensor group, which optimizer and collectives both write."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcsgd.mpi.world import World
from hpcsgd.tensors.gradients import Named
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB, TensorGroup


class Parameters:
    """Moves the trained parameters into a group; the module and its optimizer keep the same objects.

    Parameters
    ----------
    world
        The ranks.
    parameters
        (name, parameter) pairs, without duplicates; those that require no gradient stay where they are.
    bucket_mib
        Size of a bucket in MiB.
    copies
        Groups, with the same values at first, of which the module shows one at a time. Default 1.

    Attributes
    ----------
    groups
        All of them.
    group
        The one that the module shows; the first at the start.
    """

    def __init__(
        self, world: World, parameters: Named, bucket_mib: float = DEFAULT_BUCKET_MIB, copies: int = 1
    ) -> None:
        self._parameters = [(name, p) for name, p in parameters if p.requires_grad]
        self.groups = [TensorGroup(world, self._parameters, bucket_mib) for _ in range(copies)]
        for group in self.groups:
            for name, parameter in self._parameters:
                group.views[name].copy_(parameter.data)
        self.enter(0)

    def enter(self, index: int) -> None:
        """Let the module show a group."""
        self.group = self.groups[index]
        for name, parameter in self._parameters:
            parameter.data = self.group.views[name]

    def release(self) -> None:
        """Give every parameter memory of its own."""
        for _, parameter in self._parameters:
            parameter.data = parameter.data.clone()

    def copy(self) -> list[Tensor]:
        """The values now, one flat tensor a bucket."""
        return [bucket.flat.clone() for bucket in self.group]

    def restore(self, values: list[Tensor]) -> None:
        """Take back what `copy` gave."""
        for bucket, value in zip(self.group, values, strict=True):
            bucket.flat.copy_(value)

    def squared_distance(self, values: list[Tensor]) -> float:
        """The squared 2-norm of the difference between the model and `values`, in float64."""
        pairs = zip(self.group, values, strict=True)
        return sum(float(torch.linalg.vector_norm((b.flat - v).double()) ** 2) for b, v in pairs)
