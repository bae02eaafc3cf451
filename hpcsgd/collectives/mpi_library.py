"""MPI's own collectives on a bucket."""

from __future__ import annotations

import numpy as np
import torch

from hpcsgd.tensors.group import Bucket


def allreduce(bucket: Bucket, what: str, scale: float) -> None:
    """Sum by `MPI_Allreduce`. MPI has no half precision: those travel as float32."""
    world, data = bucket.world, bucket.host
    if data.element_size() < 4:
        wide = data.to(torch.float32)
        world.all.allreduce(wide.numpy(), what)
        data.copy_(wide.mul_(scale))
    else:
        world.all.allreduce(_words(data), what)
        if scale != 1.0:
            data.mul_(scale)


def allreduce_on_device(bucket: Bucket, scale: float) -> None:
    """Sum the device's memory by a CUDA-aware `MPI_Allreduce`.

    The blocking call: the non-blocking ones crash on device memory in several MPIs (mpi4py #164).
    """
    bucket.world.all.allreduce_on_device(bucket.flat)
    if scale != 1.0:
        bucket.flat.mul_(scale)


def broadcast(bucket: Bucket, what: str, root: int) -> None:
    """Overwrite with the bucket of `root` by `MPI_Bcast`."""
    bucket.world.all.broadcast(bucket.host.view(torch.uint8).numpy(), root, what)


def _words(data: torch.Tensor) -> np.ndarray:
    """As MPI shall add them: whole numbers without a sign, which wrap around."""
    unsigned = {torch.int32: np.uint32, torch.int64: np.uint64}.get(data.dtype)
    array: np.ndarray = data.numpy()
    return array if unsigned is None else array.view(unsigned)
