"""The gradients to be averaged, their exact mean, and the check of a result against it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.commands.bench import output
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import Bucket, TensorGroup


class AveragingProblem:
    """Gradients of every rank in a tensor group, to be averaged repeatedly; collective.

    Attributes
    ----------
    group
        The group in which the gradients are averaged.
    flat
        A private copy of all gradients, including the padding between tensors, (elements,) float32.
    tensors
        (start, shape) of each tensor in `flat`.
    exact
        The mean over the ranks in the layout of `flat`, float64.
    """

    def __init__(self, world: World, comm: Any, tensors: Sequence[Tensor], bucket_mib: float) -> None:
        self.world = world
        self.group = TensorGroup(world, ((str(i), t) for i, t in enumerate(tensors)), bucket_mib)
        for view, tensor in zip(self.group.views.values(), tensors, strict=True):
            view.copy_(tensor)
        self._contribution = self.result()
        self.flat = self._contribution.clone()
        self.tensors: list[tuple[int, tuple[int, ...]]] = []
        for bucket, offset in zip(self.group, self._bucket_offsets(), strict=True):
            self.tensors += [(offset + start, shape) for start, shape in tensor_extents(bucket)]
        self.exact = _mean(comm, self._contribution)

    @property
    def numel(self) -> int:
        """Number of elements, without padding."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def write(self) -> None:
        """Write the gradients into the group again."""
        for bucket, offset in zip(self.group, self._bucket_offsets(), strict=True):
            bucket.flat.copy_(self._contribution[offset : offset + bucket.numel])

    def write_flat(self) -> None:
        """Write the gradients into `flat` again."""
        self.flat.copy_(self._contribution)

    def result(self) -> Tensor:
        """The current content of the group, in the layout of `flat`."""
        return torch.cat([bucket.flat for bucket in self.group])

    def check(self, name: str, result: Tensor, limit: float, own: bool = False) -> float:
        """Return the relative L2 error of a result against the exact mean, in float64; collective.

        `limit` is the bound on the error, infinite for a biased scheme, whose result must only be finite;
        with `own` this rank's own gradients are expected instead of their mean.

        Raises
        ------
        HpcsgdError
            On all ranks, if the error of a rank is not below the limit, or means differ between ranks.
        """
        exact = self._contribution.double() if own else self.exact
        length = float(exact.norm()) or 1.0
        error = float((result.double() - exact).norm()) / length
        # Unbiased noise is orthogonal to the mean, but for chance.
        bias = float((result.double() - exact) @ exact) / length**2
        unbiased = abs(bias) < 0.1 + 5 * error / math.sqrt(len(exact))
        correct = error < limit and (unbiased or math.isinf(limit))
        bound = f"a relative error below {limit:.2g}, and at most 0.1 of it along the exact result"
        output.check(self.world, name, correct, bound, f"{error:.3g}")
        checksums = self.world.gather(zlib.crc32(result.numpy().data), f"the comparison of {name}")
        same = own or len(set(checksums)) == 1
        output.check(
            self.world, name, same, "the same on all ranks", f"checksum {checksums[self.world.rank]}"
        )
        return error

    def _bucket_offsets(self) -> list[int]:
        sizes = [bucket.numel for bucket in self.group]
        return [sum(sizes[:i]) for i in range(len(sizes))]


def tensor_extents(bucket: Bucket) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(start, shape) of each tensor of a bucket."""
    return tuple((bucket.extent(view)[0], tuple(view.shape)) for view in bucket.views)


def _mean(comm: Any, own: Tensor) -> Tensor:
    from mpi4py import MPI

    total = own.double().numpy()
    comm.Allreduce(MPI.IN_PLACE, total)
    return torch.from_numpy(np.divide(total, comm.size, out=total))
