"""The table and CSV rows of `hpcsgd bench allreduce`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.allreduce.contenders import COPIED, COPY, GLOO, HPCSGD, MPI, STAGED
from hpcsgd.mpi.world import World

ONE_COPY = "copy by one rank"


@dataclass
class SizeResult:
    """Measurements of one buffer size.

    Attributes
    ----------
    size
        Bytes of a buffer.
    seconds
        Seconds of each method, (calls,).
    passes
        How often each method must read and write a buffer.
    """

    size: int
    seconds: dict[str, np.ndarray]
    passes: dict[str, int]

    def median(self, name: str) -> float:
        """The median time of a method in seconds; NaN if it was not measured."""
        return float(np.median(self.seconds[name])) if name in self.seconds else math.nan


@dataclass
class Limit:
    """The shortest possible time of an all-reduce.

    Attributes
    ----------
    link_mbit
        Link rate of each node in Mbit/s; None if unknown.
    copied
        Seconds of a copy in the memory of one GPU, (repeats,); None on a CPU.
    copied_bytes
        Bytes of this copy.
    shares_gpu
        Whether all ranks are on one device of one node.
    """

    link_mbit: float | None
    copied: np.ndarray | None
    copied_bytes: int
    shares_gpu: bool

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the GPU's copy reads and writes; NaN on a CPU."""
        return math.nan if self.copied is None else 2 * self.copied_bytes / float(np.median(self.copied))

    def seconds(self, world: World, result: SizeResult) -> float:
        """The shortest possible time in seconds; NaN if unknown."""
        if world.nodes > 1:
            bytes_sent = 2 * (world.nodes - 1) / world.nodes * result.size
            return math.nan if self.link_mbit is None else 8e-6 * bytes_sent / self.link_mbit
        if world.device.type == "cpu":
            return result.median(COPY)
        return 2 * world.size * result.size / self.bandwidth if self.shares_gpu else math.nan

    def share(self, world: World, result: SizeResult, name: str) -> float:
        """The rate of a method relative to the limit's, by the bytes that the method must move."""
        return result.passes[name] * self.seconds(world, result) / result.median(name)

    def describe(self, world: World, results: Sequence[SizeResult]) -> str:
        """The note below the table."""
        if world.nodes > 1:
            return (
                f"limit: {self.link_mbit} Mbit/s per node"
                if self.link_mbit
                else "limit: unknown, give --link-mbit"
            )
        if world.device.type != "cpu":
            if not self.shares_gpu:
                return "limit: unknown, the ranks are on several GPUs"
            moved = "2 x ranks x size bytes, at"
            return f"limit: {moved} {1e-9 * self.bandwidth:.1f} GB/s, read and written by a copy on the GPU"
        rates = (
            f"{_human(r.size)}: {2e-9 * r.size * world.size / self.seconds(world, r):.1f}" for r in results
        )
        return "limit: memory copy; GB/s read and written by all ranks: " + ", ".join(rates)


def report(world: World, results: Sequence[SizeResult], limit: Limit, algorithm: str) -> None:
    """Print the table."""
    on_host = world.device.type == "cpu"
    measured = results[0].seconds
    columns = [name for name in measured if not (on_host and name == COPY)]
    baselines = [name for name in (MPI, GLOO) if name in measured]
    shares = [name for name in (HPCSGD, STAGED) if name in measured]
    lines = []
    for result in results:
        best = min(result.median(name) for name in baselines)
        times = [*(result.median(name) for name in columns), limit.seconds(world, result)]
        cells = [f"{1e3 * seconds:.3f}" for seconds in times]
        cells += [f"{best / result.median(name):.2f}" for name in (HPCSGD, COPIED)]
        cells += [f"{limit.share(world, result, name):.0%}" for name in shares]
        lines.append([_human(result.size), *cells])
    header = ["size", *(f"{name}\nms" for name in (*columns, "limit"))]
    header += [
        f"speed-up over\n{'best of ' * (len(baselines) > 1)}{', '.join(baselines)}",
        "speed-up\nwith copy",
    ]
    header += (
        ["share of\nlimit"] if on_host else [f"{name}: share of\nthe copy's bandwidth" for name in shares]
    )
    on_device = "" if on_host else f"{world.device.type}, "
    title = f"mean of float32, {on_device}{output.describe_ranks(world)}, {algorithm}"
    output.print_table(title, header, lines, limit.describe(world, results))


def rows(world: World, results: Sequence[SizeResult], limit: Limit) -> list[output.Row]:
    """Rows of the CSV file, one per size and method; on a GPU also one of its copy."""
    environment = {"device": world.device.type, **output.environment(world)}
    lines = [
        {
            "bytes": result.size,
            "method": name,
            **output.milliseconds(seconds),
            "share_of_limit": _rounded(limit.share(world, result, name)),
            **environment,
        }
        for result in results
        for name, seconds in result.seconds.items()
    ]
    if limit.copied is not None:
        times = output.milliseconds(limit.copied)
        lines.append(
            {"bytes": limit.copied_bytes, "method": ONE_COPY, **times, "share_of_limit": 1.0, **environment}
        )
    return lines


def _rounded(share: float) -> float | str:
    return "" if math.isnan(share) else round(share, 4)


def _human(size: int) -> str:
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:g} {unit}"
    return f"{size} B"
