"""The ways to average some float32 buffers that are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd import collectives
from hpcsgd.commands.bench import baselines
from hpcsgd.commands.bench.timing import barrier
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup

OURS, COPIED, MPI, GLOO, COPY = "hpcsgd", "hpcsgd with copy", "MPI", "gloo", "memory copy"


@dataclass
class Buffers:
    """What one method averages.

    Attributes
    ----------
    written
        Where each rank writes its values.
    run
        Averages them all.
    results
        Returns their means.
    """

    name: str
    written: list[Tensor]
    run: Callable[[], None]
    results: Callable[[], list[Tensor]]


def methods(world: World, comm: Any, numel: int, calls: int, algorithm: str) -> Iterator[Buffers]:
    named = [(f"buffer {i}", torch.empty(numel)) for i in range(calls)]
    group = TensorGroup(world, named, 4 * numel / 2**20)
    in_place = list(group.views.values())
    private, copies = ([torch.empty(numel) for _ in range(calls)] for _ in range(2))
    # As in training: gradients of at most 1 MiB, copied one by one into buckets of the default size.
    gradients = {
        f"{i} {j}": t for i, flat in enumerate(private) for j, t in enumerate(torch.split(flat, 2**18))
    }
    step = TensorGroup(world, gradients.items())

    def ours() -> None:
        for bucket in group:
            collectives.allreduce(bucket, algorithm=algorithm)

    def ours_with_copy() -> None:
        works = []
        for bucket in step:
            for name, view in zip(bucket.names, bucket.views, strict=True):
                view.copy_(gradients[name])
            works.append(collectives.iallreduce(bucket, algorithm=algorithm))
        for work in works:
            work.wait()

    def copied_means() -> list[Tensor]:
        return list(torch.split(torch.cat(list(step.views.values())), numel))

    def by(average: Callable[[Tensor], None]) -> Callable[[], None]:
        def run() -> None:
            for flat in private:
                average(flat)

        return run

    def copy() -> None:
        for source, target in zip(private, copies, strict=True):
            np.copyto(target.numpy(), source.numpy())
        # As after an average: where ranks share cores, all of them have to be over.
        barrier(comm)

    yield Buffers(OURS, in_place, ours, lambda: in_place)
    yield Buffers(COPIED, private, ours_with_copy, copied_means)
    yield Buffers(MPI, private, by(partial(baselines.mpi_mean, comm)), lambda: private)
    yield Buffers(GLOO, private, by(baselines.gloo_mean), lambda: private)
    if world.nodes == 1:
        yield Buffers(COPY, private, copy, lambda: copies)


def check(world: World, method: Buffers, values: Tensor) -> None:
    expected = values + (world.size - 1) / 2
    right = all(torch.allclose(result, expected, rtol=1e-6) for result in method.results())
    wrong = [r for r, good in enumerate(world.gather(right, "the check of a mean")) if not good]
    if wrong:
        what = f"the result of {method.name} for {4 * values.numel()} bytes is not the mean"
        raise HpcsgdError(what, rank=wrong, everywhere=True)
