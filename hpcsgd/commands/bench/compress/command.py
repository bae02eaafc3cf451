"""`hpcsgd bench compress`: what schemes cost, send and lose, beside float32, gloo and torch's hooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcsgd.commands.bench import baselines, output
from hpcsgd.commands.bench.compress import kernels
from hpcsgd.commands.bench.compress.codec_timing import PHASES, Rehearsal, called
from hpcsgd.commands.bench.compress.contenders import COPY, Method, copy_of, peers_of, reductions
from hpcsgd.commands.bench.compress.error_bounds import limit
from hpcsgd.commands.bench.compress.gradients import DATA, fitted
from hpcsgd.commands.bench.compress.problem import Problem
from hpcsgd.commands.bench.compress.results import ALLREDUCE, Result, report, rows
from hpcsgd.commands.bench.timing import Contender, check_positive, interleave, together
from hpcsgd.compress import Compressor, build
from hpcsgd.errors import BadOption, unknown
from hpcsgd.mpi.world import World
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB

SCHEMES = (
    "fp16",
    "bf16",
    "maxnorm:bits=2",
    "maxnorm:bits=4",
    "maxnorm:bits=8",
    "maxnorm:scale=bucket",
    "multiscale",
    "hadamard+maxnorm",
    "ef+maxnorm",
    "randk-maxnorm",
    "powersgd",
    "ef+powersgd",
    "topk",
    "signsgd",
)


def main(
    schemes: Sequence[str] = SCHEMES,
    elements: int | None = None,
    data: Sequence[str] = tuple(DATA),
    repeats: int = 5,
    csv: str | Path | None = None,
    device: str = "cpu",
    bucket_mib: float = DEFAULT_BUCKET_MIB,
    algorithm: str = "auto",
) -> None:
    """Compare compression schemes on the ranks of this job; rank 0 prints the tables.

    First the kernels alone. Then for each kind of gradients: encode and decode of every scheme on each
    rank, without communication, in turns with a memory copy; and the mean of the gradients over the
    ranks, in turns with float32, gloo, and DDP's hooks. Every result is checked before it is timed. A time
    is that of the slowest rank, the median over the rounds.

    Parameters
    ----------
    schemes
        Specs as of `hpcsgd.compress.build`.
    elements
        Of the gradients, which are repeated or cut to so many. Default: those of a ResNet-18, 11.2 M; for
        the kernels 16 M.
    data
        "gaussian" and "resnet18", see `hpcsgd.commands.bench.compress.gradients`. Default both.
    repeats
        Rounds, at least 1. Default 5.
    csv
        A file to write, one line per kernel, and per data, method and phase. Default: none.
    device
        "cpu" (default), or "cuda": the kernels alone, on the GPU.
    bucket_mib
        Size of a bucket in MiB. Default 4.
    algorithm
        Ours, see `hpcsgd.collectives.iallreduce`. Default "auto".

    Raises
    ------
    BadOption
        An option out of its range, or a scheme that does not exist or does not fit the ranks.
    HpcsgdError
        On all ranks, where a result is wrong, or `csv` cannot be written.
    """
    check_positive(
        "repeats, elements and bucket_mib", [repeats, 1 if elements is None else elements, bucket_mib]
    )
    compressors = {spec.strip(): build(spec) for spec in schemes}
    _check_names(compressors, data, device)
    path = None if csv is None else Path(csv)
    with World(device=device) as world:
        from mpi4py import MPI

        output.check_writable(world, path)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(world.threads)
        comm = MPI.COMM_WORLD.Dup()
        lines = kernels.measure(world, comm, elements or kernels.ELEMENTS, repeats)
        for name in data if device == "cpu" else ():
            problem = Problem(world, comm, fitted(DATA[name](world), elements), bucket_mib)
            results = _measure(problem, comm, compressors, algorithm, repeats)
            if world.rank == 0:
                report(problem, f"{name}, {algorithm}", results)
                lines += rows(problem, name, results)
        comm.Free()
        if world.rank == 0 and path is not None:
            output.write_csv(path, lines)


def _check_names(compressors: dict[str, Compressor | None], data: Sequence[str], device: str) -> None:
    for name in data:
        if name not in DATA:
            raise unknown("data", name, DATA)
    if not compressors or None in compressors.values():
        raise BadOption("schemes", expected="schemes that compress", got=list(compressors))
    if device not in ("cpu", "cuda"):
        raise unknown("device", device, ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise BadOption("device", expected="a GPU that torch can use", got="cuda, but there is none")


def _measure(
    problem: Problem,
    comm: Any,
    compressors: dict[str, Compressor | None],
    algorithm: str,
    repeats: int,
) -> dict[str, Result]:
    results = _time_reductions(problem, comm, compressors, algorithm, repeats)
    for name, seconds in _time_codecs(problem, comm, compressors, repeats).items():
        results[name].seconds |= seconds
    return results


def _time_reductions(
    problem: Problem,
    comm: Any,
    compressors: dict[str, Compressor | None],
    algorithm: str,
    repeats: int,
) -> dict[str, Result]:
    world, results = problem.world, {COPY: Result({})}
    contenders = [Contender(COPY, problem.write_flat, together(comm, copy_of(problem)))]
    with baselines.gloo(world):
        for method in (*reductions(problem, algorithm, compressors), *peers_of(problem)):
            error, sent = _first(problem, method)
            results[method.name] = Result({}, error, sent)
            contenders.append(Contender(method.name, method.write, method.run))
        for name, seconds in interleave(comm, contenders, repeats, takes=1).items():
            results[name].seconds[ALLREDUCE] = seconds
    return results


def _first(problem: Problem, method: Method) -> tuple[float, float]:
    """Error and bytes of the first run of a method."""
    world = problem.world
    before = world.traffic.sent + world.traffic.shared
    method.write()
    method.run()
    sent = world.traffic.sent + world.traffic.shared - before
    error = problem.check(method.name, method.result(), method.limit)
    mean = float(np.mean(world.gather(sent, "the bytes of an all-reduce")))
    return error, mean or np.nan  # torch's are not counted


def _time_codecs(
    problem: Problem, comm: Any, compressors: dict[str, Compressor | None], repeats: int
) -> dict[str, dict[str, np.ndarray]]:
    contenders = [Contender(COPY, problem.write_flat, together(comm, copy_of(problem)))]
    for name, compressor in compressors.items():
        assert compressor is not None
        rehearsal = Rehearsal(problem, compressor)
        rehearsal.check(name, limit(compressor, problem.numel))
        contenders += rehearsal.contenders(name, comm)
    seconds = interleave(comm, contenders, repeats, takes=1)
    phases = {name: {phase: seconds[called(name, phase)] for phase in PHASES} for name in compressors}
    return {COPY: dict.fromkeys(PHASES, seconds[COPY]), **phases}
