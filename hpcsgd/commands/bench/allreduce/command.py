"""`hpcsgd bench allreduce`: the mean of float32 buffers with hpcsgd, MPI and gloo, and the limit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from hpcsgd.commands.bench import baselines, devices, output
from hpcsgd.commands.bench.allreduce.contenders import COPY, GLOO, MPI, AllReduceMethod, check, methods
from hpcsgd.commands.bench.options import AllReduceOptions
from hpcsgd.commands.bench.output import Column, Results, Timed, times
from hpcsgd.commands.bench.timing import Contender, interleave
from hpcsgd.mpi.world import World

#: Small buffers are timed several calls at a time: a single call ends before all ranks have begun it.
_BYTES_AT_A_TIME, _MAX_CALLS = 2**20, 64
#: Bytes of the copy that gives a GPU's bandwidth: several times its cache.
_COPIED_BYTES = 2**28


@dataclass(frozen=True)
class SizeResult(Timed):
    """One method on buffers of one size."""

    size: int  # bytes
    method: str
    seconds: np.ndarray  # (calls,)
    passes: int = 1  # how often the method must read and write a buffer
    limit: float = math.nan  # the shortest possible time in seconds; NaN if unknown
    baseline: float = math.nan  # median seconds of the better of MPI and gloo


def human(size: int) -> str:
    """Bytes as text, in the largest unit that they fill."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:g} {unit}"
    return f"{size} B"


COLUMNS: list[Column[SizeResult]] = [
    Column(lambda m: m.size, "bytes", "size", human),
    Column(lambda m: m.method, "method", "method"),
    *times(lambda m: m.seconds),
    Column(lambda m: 1e3 * m.limit, heading="limit\nms", form=".3f"),
    Column(lambda m: m.baseline / m.median, heading="speed-up over\nMPI or gloo", form=".2f"),
    Column(lambda m: m.passes * m.limit / m.median, "share_of_limit", "share of\nlimit", ".0%"),
]


@dataclass(frozen=True)
class Limit:
    """The shortest possible time of an all-reduce."""

    link_mbit: float | None  # link rate of each node in Mbit/s; None if unknown
    copied: np.ndarray | None  # seconds of a copy in the memory of one GPU, (repeats,); None on a CPU
    copied_bytes: int
    shares_gpu: bool  # whether all ranks are on one device of one node

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the GPU's copy reads and writes; NaN on a CPU."""
        return math.nan if self.copied is None else 2 * self.copied_bytes / float(np.median(self.copied))

    def seconds(self, world: World, size: int, copy: float) -> float:
        """The shortest possible time for buffers of `size` bytes; `copy` is that of all ranks at once."""
        if world.nodes > 1:
            bytes_sent = 2 * (world.nodes - 1) / world.nodes * size
            return math.nan if self.link_mbit is None else 8e-6 * bytes_sent / self.link_mbit
        if world.device.type == "cpu":
            return copy
        return 2 * world.size * size / self.bandwidth if self.shares_gpu else math.nan

    def describe(self, world: World, results: Sequence[SizeResult]) -> str:
        """The note below the table."""
        if world.nodes > 1:
            known = self.link_mbit is not None
            return f"limit: {self.link_mbit} Mbit/s per node" if known else "limit: unknown, give --link-mbit"
        if world.device.type != "cpu":
            if not self.shares_gpu:
                return "limit: unknown, the ranks are on several GPUs"
            rate = f"{1e-9 * self.bandwidth:.1f} GB/s, read and written by a copy on the GPU"
            return f"limit: 2 x ranks x size bytes, at {rate}"
        copies = [m for m in results if m.method == COPY]
        rates = (f"{human(m.size)}: {2e-9 * m.size * world.size / m.limit:.1f}" for m in copies)
        return "limit: memory copy; GB/s read and written by all ranks: " + ", ".join(rates)


def main(options: AllReduceOptions) -> None:
    """Time all-reduces on the ranks of this job; rank 0 prints a table.

    Every rank rewrites its buffers before each timed call, as backward does, and all ranks start at a
    barrier. The methods alternate; a time is that of the slowest rank, the median over the repeats.

    On a GPU the buffers are in device memory, and each rank waits for its device before the barrier and at
    the end of the call. "hpcsgd" exchanges as it chooses itself, by windows of device memory where it has
    them; "hpcsgd staged" has none, so it copies through pinned host memory. MPI is measured if
    `HPCSGD_CUDA_AWARE` is 1.

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
    with devices.open_world(options.device, options.csv) as world, contextlib.ExitStack() as stack:
        staged = None
        if world.device.type != "cpu":
            with devices.without_windows():
                staged = stack.enter_context(World(device=options.device))
        limit = _limit(world, options)
        sizes = [int(1024 * size) for size in options.sizes]
        measured = [m for size in sizes for m in _measure(world, staged, size, limit, options)]
        on_device = "" if limit.copied is None else f"{world.device.type}, "
        title = f"mean of float32, {on_device}{output.describe_ranks(world)}, {options.algorithm}"
        table = Results(COLUMNS, measured, title, limit.describe(world, measured))
        if world.rank == 0:
            table.show()
            if limit.copied is not None:
                median = float(np.median(limit.copied))
                measured.append(SizeResult(_COPIED_BYTES, "copy by one rank", limit.copied, 1, median))
            environment = {"device": world.device.type, **output.environment(world)}
            output.write_csv(options.csv, table.rows(environment))


def _limit(world: World, options: AllReduceOptions) -> Limit:
    """The limit of this job; on a GPU measured by rank 0 while the others wait; collective."""
    copied = None
    if world.device.type != "cpu" and world.rank == 0:
        source = torch.ones(_COPIED_BYTES // 4, device=world.device)
        copied = devices.time_copy(source, torch.empty_like(source), options.repeats)
    gpus = world.gather(str(world.device), "the copy bandwidth of the GPU")
    shares_gpu = world.nodes == 1 and len(set(gpus)) == 1
    return Limit(options.link_mbit, copied, _COPIED_BYTES, shares_gpu)


def _measure(
    world: World, staged: World | None, size: int, limit: Limit, options: AllReduceOptions
) -> list[SizeResult]:
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
        compared = list(methods(world, comm, numel, calls, options.algorithm, staged))
        for method in compared:
            write_values(method)
            method.run()
            if method.name != COPY:
                check(world, method, values)
        contenders = [
            Contender(m.name, partial(fill, m), devices.synchronized(world.device, m.run), calls)
            for m in compared
        ]
        seconds = interleave(comm, contenders, options.repeats)
    comm.Free()
    medians = {name: float(np.median(each)) for name, each in seconds.items()}
    shortest = limit.seconds(world, size, medians.get(COPY, math.nan))
    baseline = min(medians[name] for name in (MPI, GLOO) if name in medians)
    return [SizeResult(size, m.name, seconds[m.name], m.passes, shortest, baseline) for m in compared]
