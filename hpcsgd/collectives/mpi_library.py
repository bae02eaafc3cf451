"""MPI's own collectives on a bucket."""

from __future__ import annotations

import numpy as np
import torch

from hpcsgd.mpi.tasks import Steps
from hpcsgd.tensors.group import Bucket


def allreduce(bucket: Bucket, scale: float) -> Steps[None]:
    """Sum by `MPI_Allreduce`; half precision, which MPI lacks, is sent as float32."""
    world, data = bucket.world, bucket.host
    if data.element_size() < 4:
        wide = data.to(torch.float32)
        yield world.all.completion(world.all.iallreduce(wide.numpy(), "SUM"))
        data.copy_(wide.mul_(scale))
    else:
        yield world.all.completion(world.all.iallreduce(_array(data), "SUM"))
        if scale != 1.0:
            data.mul_(scale)


def allreduce_on_device(bucket: Bucket, scale: float) -> None:
    """Sum device memory by a CUDA-aware `MPI_Allreduce`.

    Uses the blocking call, because the non-blocking one crashes on device memory in several MPI libraries
    (mpi4py #164).
    """
    bucket.world.all.allreduce_on_device(bucket.flat)
    if scale != 1.0:
        bucket.flat.mul_(scale)


def broadcast(bucket: Bucket, root: int) -> Steps[None]:
    """Overwrite with the bucket of `root` by `MPI_Bcast`."""
    world = bucket.world
    yield world.all.completion(world.all.ibroadcast(bucket.host.view(torch.uint8).numpy(), root), root)


def _array(data: torch.Tensor) -> np.ndarray:
    """Return the tensor as an array; integers are unsigned, because sums of packed codes wrap around."""
    unsigned = {torch.int32: np.uint32, torch.int64: np.uint64}.get(data.dtype)
    array: np.ndarray = data.numpy()
    return array if unsigned is None else array.view(unsigned)
