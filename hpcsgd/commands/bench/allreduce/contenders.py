"""The methods that `hpcsgd bench allreduce` compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd import collectives
from hpcsgd.commands.bench import baselines, devices, output
from hpcsgd.commands.bench.timing import barrier
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import TensorGroup

HPCSGD, COPIED, MPI, GLOO, COPY = "hpcsgd", "hpcsgd with copy", "MPI", "gloo", "memory copy"
STAGED = "hpcsgd staged"


@dataclass
class AllReduceMethod:
    """One method of averaging float32 buffers: `inputs`, into which each rank writes its values.

    `passes` is how often the method must read and write a buffer in the memory of the model: once in place,
    and once more to copy gradients into buckets.
    """

    name: str
    inputs: list[Tensor]
    run: Callable[[], None]
    results: Callable[[], list[Tensor]]
    passes: int = 1


def methods(
    world: World, comm: Any, numel: int, calls: int, algorithm: str, staged: World | None = None
) -> Iterator[AllReduceMethod]:
    """All methods, for `calls` buffers of `numel` elements; collective.

    hpcsgd in place, the same with `staged`, a world without windows of device memory, and with gradients that
    are copied into buckets; MPI, on a GPU if it reads device memory; gloo; and on one node a memory copy.
    """
    device = world.device
    private, copies = ([torch.empty(numel, device=device) for _ in range(calls)] for _ in range(2))
    # As in training: gradients of at most 1 MiB, copied one by one into buckets of the default size.
    gradients = {
        f"{i} {j}": t for i, flat in enumerate(private) for j, t in enumerate(torch.split(flat, 2**18))
    }
    step = TensorGroup(world, gradients.items())

    def in_place(name: str, world: World) -> AllReduceMethod:
        named = [(f"buffer {i}", torch.empty(numel, device=device)) for i in range(calls)]
        group = TensorGroup(world, named, 4 * numel / 2**20)

        def run() -> None:
            for bucket in group:
                collectives.allreduce(bucket, algorithm=algorithm)

        views = list(group.views.values())
        return AllReduceMethod(name, views, run, lambda: views)

    def allreduce_with_copy() -> None:
        works = []
        for bucket in step:
            for name, view in zip(bucket.names, bucket.views, strict=True):
                view.copy_(gradients[name])
            works.append(collectives.iallreduce(bucket, algorithm=algorithm))
        for work in works:
            work.wait()

    def copied_means() -> list[Tensor]:
        return list(torch.split(torch.cat(list(step.views.values())), numel))

    def each_with(average: Callable[[Tensor], None]) -> Callable[[], None]:
        def run() -> None:
            for flat in private:
                average(flat)

        return run

    def copy() -> None:
        for source, target in zip(private, copies, strict=True):
            if device.type == "cpu":
                np.copyto(target.numpy(), source.numpy())
            else:
                target.copy_(source)
        devices.synchronize(device)
        # As after an average: where ranks share cores, all of them have to finish.
        barrier(comm)

    yield in_place(HPCSGD, world)
    if staged is not None:
        with devices.without_windows():
            method = in_place(STAGED, staged)
        yield method
    yield AllReduceMethod(COPIED, private, allreduce_with_copy, copied_means, passes=2)
    # Never guessed: an MPI that cannot read device memory takes its addresses for the host's, and crashes.
    if device.type == "cpu" or world.cuda_aware:
        yield AllReduceMethod(MPI, private, each_with(partial(baselines.mpi_mean, comm)), lambda: private)
    yield AllReduceMethod(GLOO, private, each_with(baselines.gloo_mean), lambda: private)
    if world.nodes == 1:
        yield AllReduceMethod(COPY, private, copy, lambda: copies)


def check(world: World, method: AllReduceMethod, values: Tensor) -> None:
    """Raise `HpcsgdError` on all ranks if the results are not the mean of `values` plus the rank."""
    expected = values + (world.size - 1) / 2
    correct = all(torch.allclose(result, expected, rtol=1e-6) for result in method.results())
    name = f"{method.name} for {4 * values.numel()} bytes"
    output.check(world, name, correct, "the mean over the ranks", "right" if correct else "wrong")
