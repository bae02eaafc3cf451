"""`hpcsgd bench compress`: time, bytes and error of schemes, beside float32, gloo and torch's DDP hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcsgd.commands.bench import baselines, devices, output
from hpcsgd.commands.bench.compress import kernels
from hpcsgd.commands.bench.compress.codec_timing import PHASES, CodecTimer, phase_name
from hpcsgd.commands.bench.compress.contenders import (
    COPY,
    ReductionMethod,
    baseline_methods,
    error_bound,
    memory_copy,
    scheme_methods,
)
from hpcsgd.commands.bench.compress.gradients import DATA, resize
from hpcsgd.commands.bench.compress.problem import AveragingProblem
from hpcsgd.commands.bench.compress.results import (
    ALLREDUCE,
    CSV_COLUMNS,
    SchemeResult,
    measurements,
    scheme_table,
)
from hpcsgd.commands.bench.options import CompressOptions
from hpcsgd.commands.bench.output import Results
from hpcsgd.commands.bench.timing import interleave
from hpcsgd.compress import build
from hpcsgd.compress.base import Compressor
from hpcsgd.errors import BadOption


def main(options: CompressOptions) -> None:
    """Time compression schemes on the ranks of this job; rank 0 prints the tables.

    First the kernels alone. Then, for each kind of gradients: encode and decode of every scheme on each rank,
    without communication, alternating with a memory copy; and the mean of the gradients over the ranks,
    alternating with float32, gloo and DDP's hooks. Every result is checked before it is timed. A time is that
    of the slowest rank, the median over the repeats. The gradients are repeated or cut to `elements`.

    Raises
    ------
    BadOption
        Torch cannot use the device, or a scheme does not exist or does not fit the ranks.
    HpcsgdError
        On all ranks, if a result is wrong, or `csv` cannot be written.
    """
    compressors = _build(options.schemes)
    with devices.open_world(options.device, options.csv) as world:
        from mpi4py import MPI

        devices.set_threads(world)
        comm, elements = MPI.COMM_WORLD.Dup(), options.elements
        measured = kernels.measure(world, comm, elements or kernels.ELEMENTS[options.device], options.repeats)
        for name in _gradients(options):
            problem = AveragingProblem(world, comm, resize(DATA[name](world), elements), options.bucket_mib)
            results = _measure(problem, comm, compressors, options)
            if world.rank == 0:
                scheme_table(problem, f"{name}, {options.algorithm}", results).show()
                measured += measurements(name, problem.numel, results)
        comm.Free()
        if world.rank == 0:
            rows = Results(CSV_COLUMNS, measured).rows(output.environment(world))
            output.write_csv(options.csv, rows)


def _gradients(options: CompressOptions) -> list[str]:
    if options.device != "cpu":
        return []
    return list(DATA) if options.data == "both" else [options.data]


def _build(schemes: Sequence[str]) -> dict[str, Compressor]:
    built = {spec.strip(): build(spec) for spec in schemes}
    compressors = {spec: compressor for spec, compressor in built.items() if compressor is not None}
    if len(compressors) < len(built):
        expected = "no scheme 'none': float32 is always measured"
        raise BadOption("the schemes (--schemes) cannot be compared", expected=expected, got=list(built))
    return compressors


def _measure(
    problem: AveragingProblem, comm: Any, compressors: dict[str, Compressor], options: CompressOptions
) -> dict[str, SchemeResult]:
    results, contenders = {COPY: SchemeResult({})}, [memory_copy(problem, comm)]
    with baselines.gloo(problem.world):
        schemes = scheme_methods(problem, options.algorithm, compressors)
        for method in (*schemes, *baseline_methods(problem)):
            results[method.name] = SchemeResult({}, *_run_once(problem, method))
            contenders.append(method)
        for name, seconds in interleave(comm, contenders, options.repeats, timed_calls=1).items():
            results[name].seconds[ALLREDUCE] = seconds
    for name, phases in _time_codecs(problem, comm, compressors, options.repeats).items():
        results[name].seconds |= phases
    return results


def _run_once(problem: AveragingProblem, method: ReductionMethod) -> tuple[float, float]:
    """Run a method for the first time; returns its error, and the mean of the bytes moved per rank."""
    world = problem.world
    before = world.traffic.sent + world.traffic.shared
    method.prepare()
    method.run()
    sent = world.traffic.sent + world.traffic.shared - before
    error = problem.check(method.name, method.result(), method.error_bound)
    mean = float(np.mean(world.gather(sent, "the bytes of an all-reduce")))
    return error, mean or np.nan  # bytes of torch are not counted


def _time_codecs(
    problem: AveragingProblem, comm: Any, compressors: dict[str, Compressor], repeats: int
) -> dict[str, dict[str, np.ndarray]]:
    contenders = [memory_copy(problem, comm)]
    for name, compressor in compressors.items():
        timer = CodecTimer(problem, compressor)
        timer.check(name, error_bound(compressor, problem.numel))
        contenders += timer.contenders(name, comm)
    seconds = interleave(comm, contenders, repeats, timed_calls=1)
    phases = {name: {phase: seconds[phase_name(name, phase)] for phase in PHASES} for name in compressors}
    return {COPY: dict.fromkeys(PHASES, seconds[COPY]), **phases}
