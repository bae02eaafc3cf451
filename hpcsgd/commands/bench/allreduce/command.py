"""`hpcsgd bench allreduce`: the mean of float32 buffers with hpcsgd, MPI and gloo, and the limit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hpcsgd.commands.bench import baselines, output
from hpcsgd.commands.bench.allreduce.contenders import (
    COPIED,
    COPY,
    GLOO,
    HPCSGD,
    MPI,
    AllReduceMethod,
    check,
    methods,
)
from hpcsgd.commands.bench.timing import Contender, check_positive, interleave
from hpcsgd.mpi.world import World

SIZES = (4 * 2**10, 256 * 2**10, 4 * 2**20, 64 * 2**20)
#: Small buffers are timed several calls at a time: a single call ends before all ranks have begun it.
_BYTES_AT_A_TIME, _MAX_CALLS = 2**20, 64


def main(
    sizes: Sequence[int] = SIZES,
    repeats: int = 10,
    csv: str | Path | None = None,
    algorithm: str = "auto",
    link_mbit: float | None = None,
) -> None:
    """Time all-reduces on the ranks of this job; rank 0 prints a table.

    Every rank rewrites its buffers before each timed call, as backward does, and all ranks start at a
    barrier. The methods alternate; a time is that of the slowest rank, the median over the repeats.

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

    Raises
    ------
    HpcsgdError
        On all ranks, if a method's result is not the mean, or `csv` cannot be written.
    """
    check_positive("sizes", [size // 4 for size in sizes])
    check_positive("repeats", [repeats])
    check_positive("link_mbit", [1.0 if link_mbit is None else link_mbit])
    path = None if csv is None else Path(csv)
    with World(device="cpu") as world:
        output.check_writable(world, path)
        seconds = {size: _measure(world, size, repeats, algorithm) for size in sizes}
        if world.rank == 0:
            _report(world, seconds, algorithm, link_mbit)
            if path is not None:
                output.write_csv(path, _rows(world, seconds))


def _measure(world: World, size: int, repeats: int, algorithm: str) -> dict[str, np.ndarray]:
    from mpi4py.MPI import COMM_WORLD

    comm = COMM_WORLD.Dup()
    numel = size // 4
    calls = max(1, min(_MAX_CALLS, _BYTES_AT_A_TIME // size))
    values = torch.arange(numel, dtype=torch.float32, device="cpu").remainder_(251)

    def write_values(method: AllReduceMethod) -> None:
        for tensor in method.inputs:
            torch.add(values, world.rank, out=tensor)

    def fill(method: AllReduceMethod) -> None:
        # Reads no other memory, so that only the buffers are in the caches.
        for tensor in method.inputs:
            tensor.fill_(world.rank)

    with baselines.gloo(world):
        compared = list(methods(world, comm, numel, calls, algorithm))
        for method in compared:
            write_values(method)
            method.run()
            if method.name != COPY:
                check(world, method, values)
        contenders = [Contender(m.name, partial(fill, m), m.run, calls) for m in compared]
        seconds = interleave(comm, contenders, repeats)
    comm.Free()
    return seconds


def _limit(world: World, size: int, times: dict[str, float], link_mbit: float | None) -> float:
    """The shortest possible time in seconds; NaN if unknown."""
    if world.nodes == 1:
        return times[COPY]
    bytes_sent = 2 * (world.nodes - 1) / world.nodes * size
    return float("nan") if link_mbit is None else 8e-6 * bytes_sent / link_mbit


def _report(
    world: World,
    seconds: dict[int, dict[str, np.ndarray]],
    algorithm: str,
    link_mbit: float | None,
) -> None:
    lines, rates = [], []
    for size, samples in seconds.items():
        t = {name: float(np.median(s)) for name, s in samples.items()}
        limit, best = _limit(world, size, t, link_mbit), min(t[MPI], t[GLOO])
        columns = [t[HPCSGD], t[COPIED], t[MPI], t[GLOO], limit]
        ratios = [f"{best / t[HPCSGD]:.2f}", f"{best / t[COPIED]:.2f}", f"{limit / t[HPCSGD]:.0%}"]
        lines.append([_human(size), *(f"{1e3 * s:.3f}" for s in columns), *ratios])
        rates.append(f"{_human(size)}: {2e-9 * size * world.size / limit:.1f}")
    header = ["size", *(f"{n}\nms" for n in (HPCSGD, COPIED, MPI, GLOO, "limit"))]
    header += ["speed-up over\nbest of MPI, gloo", "speed-up\nwith copy", "share of\nlimit"]
    notes = f"limit: {link_mbit} Mbit/s per node" if link_mbit else "limit: unknown, give --link-mbit"
    if world.nodes == 1:
        notes = "limit: memory copy; GB/s read and written by all ranks: " + ", ".join(rates)
    output.print_table(f"mean of float32, {output.describe_ranks(world)}, {algorithm}", header, lines, notes)


def _rows(world: World, seconds: dict[int, dict[str, np.ndarray]]) -> list[output.Row]:
    environment = output.environment(world)
    return [
        {"bytes": size, "method": name, **output.milliseconds(samples), **environment}
        for size, times in seconds.items()
        for name, samples in times.items()
    ]


def _human(size: int) -> str:
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:g} {unit}"
    return f"{size} B"
