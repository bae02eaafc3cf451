"""What is to be averaged, and whether a result is its mean."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import Bucket, TensorGroup


class Problem:
    """Gradients of every rank in a tensor group, to be averaged again and again.

    Parameters
    ----------
    world
        The ranks.
    comm
        An mpi4py communicator of these.
    tensors
        This rank's gradients, float32; the same shapes on all ranks.
    bucket_mib
        Size of a bucket.

    Attributes
    ----------
    group
        Where the gradients are averaged.
    flat
        A private copy of all of them, with the gaps between tensors, (numel,).
    tensors
        (start, shape) of each tensor in `flat`.
    """

    def __init__(self, world: World, comm: Any, tensors: Sequence[Tensor], bucket_mib: float) -> None:
        self.world = world
        self.group = TensorGroup(world, ((str(i), t) for i, t in enumerate(tensors)), bucket_mib)
        for view, tensor in zip(self.group.views.values(), tensors, strict=True):
            view.copy_(tensor)
        self._own = self.result()
        self.flat = self._own.clone()
        self.tensors: list[tuple[int, tuple[int, ...]]] = []
        for bucket, first in zip(self.group, self._firsts(), strict=True):
            self.tensors += [(first + start, shape) for start, shape in places(bucket)]
        self.exact = _mean(comm, self._own)

    @property
    def numel(self) -> int:
        """Elements, without the gaps."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    def write(self) -> None:
        """Put the gradients into the group again."""
        for bucket, first in zip(self.group, self._firsts(), strict=True):
            bucket.flat.copy_(self._own[first : first + bucket.numel])

    def write_flat(self) -> None:
        """Put the gradients into `flat` again."""
        self.flat.copy_(self._own)

    def result(self) -> Tensor:
        """What the group holds now, as `flat` is laid out."""
        return torch.cat([bucket.flat for bucket in self.group])

    def check(self, name: str, result: Tensor, limit: float, own: bool = False) -> float:
        """The relative L2 error of a result against the exact mean, in float64.

        Parameters
        ----------
        name
            Of the method, for the error.
        result
            As `flat` is laid out.
        limit
            Of the error; infinite for a biased scheme, whose result must only be finite.
        own
            Whether it is this rank's own gradients that are expected, and not their mean.

        Raises
        ------
        HpcsgdError
            On all ranks, where a rank's error is not below the limit, or means differ between the ranks.
        """
        exact = self._own.double() if own else self.exact
        length = float(exact.norm()) or 1.0
        error = float((result.double() - exact).norm()) / length
        # Noise without bias is at right angles to what it is added to, but for chance.
        slope = float((result.double() - exact) @ exact) / length**2
        straight = abs(slope) < 0.1 + 5 * error / math.sqrt(len(exact))
        good = error < limit and (straight or math.isinf(limit))
        seen = self.world.gather((good, error, zlib.crc32(result.numpy().data)), f"the check of {name}")
        wrong = [rank for rank, (fine, _, _) in enumerate(seen) if not fine]
        if wrong:
            raise HpcsgdError(
                f"the result of {name} is wrong",
                rank=wrong,
                expected=f"a relative error below {limit:.2g}, of which at most a tenth in its direction",
                got=", ".join(f"{error:.3g}" for _, error, _ in seen),
                everywhere=True,
            )
        if not own and len({digest for _, _, digest in seen}) > 1:
            raise HpcsgdError(f"the results of {name} differ between ranks", everywhere=True)
        return error

    def _firsts(self) -> list[int]:
        sizes = [bucket.numel for bucket in self.group]
        return [sum(sizes[:i]) for i in range(len(sizes))]


def places(bucket: Bucket) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """(start, shape) of each tensor of a bucket."""
    return tuple((bucket.extent(view)[0], tuple(view.shape)) for view in bucket.views)


def _mean(comm: Any, own: Tensor) -> Tensor:
    from mpi4py import MPI

    total = own.double().numpy()
    comm.Allreduce(MPI.IN_PLACE, total)
    return torch.from_numpy(np.divide(total, comm.size, out=total))
