"""`hpcsgd bench compress`: time, bytes and error of schemes, beside float32, gloo and torch's DDP hooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcsgd.commands.bench import baselines, devices, output
from hpcsgd.commands.bench.compress import kernels
from hpcsgd.commands.bench.compress.codec_timing import PHASES, CodecTimer, phase_name
from hpcsgd.commands.bench.compress.contenders import (
    COPY,
    ReductionMethod,
    baseline_methods,
    memory_copy,
    scheme_methods,
)
from hpcsgd.commands.bench.compress.error_bounds import error_bound
from hpcsgd.commands.bench.compress.gradients import DATA, resize
from hpcsgd.commands.bench.compress.problem import AveragingProblem
from hpcsgd.commands.bench.compress.results import ALLREDUCE, SchemeResult, report, rows
from hpcsgd.commands.bench.timing import Contender, interleave, with_barrier
from hpcsgd.compress import build
from hpcsgd.compress.base import Compressor
from hpcsgd.errors import BadOption
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
    """Time compression schemes on the ranks of this job; rank 0 prints the tables.

    First the kernels alone. Then, for each kind of gradients: encode and decode of every scheme on each rank,
    without communication, alternating with a memory copy; and the mean of the gradients over the ranks,
    alternating with float32, gloo and DDP's hooks. Every result is checked before it is timed. A time is that
    of the slowest rank, the median over the repeats.

    Parameters
    ----------
    schemes
        Specs for `hpcsgd.compress.build`.
    elements
        Number of gradient elements; the gradients are repeated or cut to it. Default: those of a ResNet-18,
        11.2 M; for the kernels 16.8 M, on a GPU 134 M.
    data
        "gaussian" and "resnet18", see `hpcsgd.commands.bench.compress.gradients`. Default: both.
    repeats
        Repetitions, at least 1. Default 5.
    csv
        A CSV file with a line per kernel, and per data, method and phase. Default: none.
    device
        "cpu" (default), or "cuda": the kernels alone, on the GPU.
    bucket_mib
        Bucket size in MiB. Default 4.
    algorithm
        Algorithm of hpcsgd, see `hpcsgd.collectives.iallreduce`. Default "auto".

    Raises
    ------
    BadOption
        Torch cannot use the device, or a scheme does not exist or does not fit the ranks.
    HpcsgdError
        On all ranks, if a result is wrong, or `csv` cannot be written.
    """
    compressors = {spec.strip(): build(spec) for spec in schemes}
    _check(compressors)
    devices.check_device(device)
    path = None if csv is None else Path(csv)
    with World(device=device) as world:
        from mpi4py import MPI

        output.check_writable(world, path)
        devices.select_device(world.device)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(world.local.threads)
        comm = MPI.COMM_WORLD.Dup()
        lines = kernels.measure(world, comm, elements or kernels.ELEMENTS[device], repeats)
        for name in data if device == "cpu" else ():
            problem = AveragingProblem(world, comm, resize(DATA[name](world), elements), bucket_mib)
            results = _measure(problem, comm, compressors, algorithm, repeats)
            if world.rank == 0:
                report(problem, f"{name}, {algorithm}", results)
                lines += rows(problem, name, results)
        comm.Free()
        if world.rank == 0 and path is not None:
            output.write_csv(path, lines)


def _check(compressors: dict[str, Compressor | None]) -> None:
    if None in compressors.values():
        expected = "no scheme 'none': float32 is always measured"
        raise BadOption(
            "the schemes (--schemes) cannot be compared", expected=expected, got=list(compressors)
        )


def _measure(
    problem: AveragingProblem,
    comm: Any,
    compressors: dict[str, Compressor | None],
    algorithm: str,
    repeats: int,
) -> dict[str, SchemeResult]:
    results = _time_reductions(problem, comm, compressors, algorithm, repeats)
    for name, seconds in _time_codecs(problem, comm, compressors, repeats).items():
        results[name].seconds |= seconds
    return results


def _time_reductions(
    problem: AveragingProblem,
    comm: Any,
    compressors: dict[str, Compressor | None],
    algorithm: str,
    repeats: int,
) -> dict[str, SchemeResult]:
    world, results = problem.world, {COPY: SchemeResult({})}
    contenders = [Contender(COPY, problem.write_flat, with_barrier(comm, memory_copy(problem)))]
    with baselines.gloo(world):
        for method in (*scheme_methods(problem, algorithm, compressors), *baseline_methods(problem)):
            error, sent = _run_once(problem, method)
            results[method.name] = SchemeResult({}, error, sent)
            contenders.append(Contender(method.name, method.write, method.run))
        for name, seconds in interleave(comm, contenders, repeats, timed_calls=1).items():
            results[name].seconds[ALLREDUCE] = seconds
    return results


def _run_once(problem: AveragingProblem, method: ReductionMethod) -> tuple[float, float]:
    """Run a method for the first time; returns its error, and the mean of the bytes moved per rank."""
    world = problem.world
    before = world.traffic.sent + world.traffic.shared
    method.write()
    method.run()
    sent = world.traffic.sent + world.traffic.shared - before
    error = problem.check(method.name, method.result(), method.error_bound)
    mean = float(np.mean(world.gather(sent, "the bytes of an all-reduce")))
    return error, mean or np.nan  # bytes of torch are not counted


def _time_codecs(
    problem: AveragingProblem, comm: Any, compressors: dict[str, Compressor | None], repeats: int
) -> dict[str, dict[str, np.ndarray]]:
    contenders = [Contender(COPY, problem.write_flat, with_barrier(comm, memory_copy(problem)))]
    for name, compressor in compressors.items():
        assert compressor is not None
        timer = CodecTimer(problem, compressor)
        timer.check(name, error_bound(compressor, problem.numel))
        contenders += timer.contenders(name, comm)
    seconds = interleave(comm, contenders, repeats, timed_calls=1)
    phases = {name: {phase: seconds[phase_name(name, phase)] for phase in PHASES} for name in compressors}
    return {COPY: dict.fromkeys(PHASES, seconds[COPY]), **phases}
