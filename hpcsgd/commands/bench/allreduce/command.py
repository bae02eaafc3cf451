"""`hpcsgd bench allreduce`: the mean of float32 buffers with hpcsgd, MPI and gloo, and the limit."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from hpcsgd.commands.bench import baselines, devices, output
from hpcsgd.commands.bench.allreduce.contenders import COPY, AllReduceMethod, check, methods
from hpcsgd.commands.bench.allreduce.results import Limit, SizeResult, report, rows
from hpcsgd.commands.bench.timing import Contender, interleave
from hpcsgd.mpi.world import World

SIZES = (4 * 2**10, 256 * 2**10, 4 * 2**20, 64 * 2**20)
#: Small buffers are timed several calls at a time: a single call ends before all ranks have begun it.
_BYTES_AT_A_TIME, _MAX_CALLS = 2**20, 64
#: Bytes of the copy that gives a GPU's bandwidth: several times its cache.
_COPIED_BYTES = 2**28


def main(
    sizes: Sequence[int] = SIZES,
    repeats: int = 10,
    csv: str | Path | None = None,
    algorithm: str = "auto",
    link_mbit: float | None = None,
    device: str = "cpu",
) -> None:
    """Time all-reduces on the ranks of this job; rank 0 prints a table.

    Every rank rewrites its buffers before each timed call, as backward does, and all ranks start at a
    barrier. The methods alternate; a time is that of the slowest rank, the median over the repeats.

    On a GPU the buffers are in device memory, and each rank waits for its device before the barrier and at
    the end of the call. "hpcsgd" exchanges as it chooses itself, by windows of device memory where it has
    them; "hpcsgd staged" has none, so it copies through pinned host memory. MPI is measured if
    `HPCSGD_CUDA_AWARE` is 1.

    Parameters
    ----------
    sizes
        Buffer sizes in bytes of float32. Default 4 KiB, 256 KiB, 4 MiB, 64 MiB.
    repeats
        Repetitions, at least 1. Default 10.
    csv
        A CSV file with a line per size and method. Default: none.
    algorithm
        Algorithm of hpcsgd, see `hpcsgd.collectives.iallreduce`. Default "auto".
    link_mbit
        Nominal link rate of each node in Mbit/s, which gives the limit between nodes. Default: none is
        shown. On one node the limit is a copy of as many bytes by all ranks at once.
    device
        "cpu" (default) or "cuda".

    Raises
    ------
    BadOption
        Torch cannot use the device.
    HpcsgdError
        On all ranks, if a method's result is not the mean, or `csv` cannot be written.

    Notes
    -----
    The limit where all ranks share one GPU: an all-reduce of n bytes over p ranks must read every rank's row
    once and write it once, so 2 p n bytes of its memory; a copy of c bytes, which one rank makes while the
    others wait, moves 2 c. The quotient of the two rates is the share of the copy's bandwidth. Copies of
    gradients into buckets count as bytes that "hpcsgd with copy" must move too. Buffers that fit the GPU's
    cache may exceed the limit, as those that backward has just written would.
    """
    devices.check_device(device)
    path = None if csv is None else Path(csv)
    with World(device=device) as world, contextlib.ExitStack() as stack:
        output.check_writable(world, path)
        devices.select_device(world.device)
        staged = None
        if world.device.type != "cpu":
            with devices.without_windows():
                staged = stack.enter_context(World(device=device))
        limit = _limit(world, link_mbit, repeats)
        results = [_measure(world, staged, size, repeats, algorithm) for size in sizes]
        if world.rank == 0:
            report(world, results, limit, algorithm)
            if path is not None:
                output.write_csv(path, rows(world, results, limit))


def _limit(world: World, link_mbit: float | None, repeats: int) -> Limit:
    """The limit of this job; on a GPU measured by rank 0 while the others wait; collective."""
    copied = None
    if world.device.type != "cpu" and world.rank == 0:
        source = torch.ones(_COPIED_BYTES // 4, device=world.device)
        copied = devices.time_copy(source, torch.empty_like(source), repeats)
    gpus = world.gather(str(world.device), "the copy bandwidth of the GPU")
    return Limit(link_mbit, copied, _COPIED_BYTES, shares_gpu=world.nodes == 1 and len(set(gpus)) == 1)


def _measure(world: World, staged: World | None, size: int, repeats: int, algorithm: str) -> SizeResult:
    from mpi4py.MPI import COMM_WORLD

    comm = COMM_WORLD.Dup()
    numel = size // 4
    calls = max(1, min(_MAX_CALLS, _BYTES_AT_A_TIME // size))
    values = torch.arange(numel, dtype=torch.float32, device=world.device).remainder_(251)

    def write_values(method: AllReduceMethod) -> None:
        for tensor in method.inputs:
            torch.add(values, world.rank, out=tensor)

    def fill(method: AllReduceMethod) -> None:
        # Reads no other memory, so that only the buffers are in the caches.
        for tensor in method.inputs:
            tensor.fill_(world.rank)
        devices.synchronize(world.device)

    with baselines.gloo(world):
        compared = list(methods(world, comm, numel, calls, algorithm, staged))
        for method in compared:
            write_values(method)
            method.run()
            if method.name != COPY:
                check(world, method, values)
        contenders = [
            Contender(m.name, partial(fill, m), devices.synchronized(world.device, m.run), calls)
            for m in compared
        ]
        seconds = interleave(comm, contenders, repeats)
    comm.Free()
    return SizeResult(size, seconds, {m.name: m.passes for m in compared})
