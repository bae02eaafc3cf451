"""The methods that `hpcsgd bench compress` compares: each scheme, float32, gloo and torch's DDP hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.commands.bench import baselines
from hpcsgd.commands.bench.compress import ddp_hooks
from hpcsgd.commands.bench.compress.error_bounds import error_bound
from hpcsgd.commands.bench.compress.problem import AveragingProblem
from hpcsgd.compress.base import Compressor
from hpcsgd.compress.half import FP16

FLOAT32, GLOO, COPY = "float32", "gloo float32", "memory copy"


@dataclass
class ReductionMethod:
    """One method of averaging the gradients.

    Attributes
    ----------
    name
        Name in tables and CSV files.
    write
        Writes the gradients into the buffers that `run` averages.
    run
        Averages them.
    result
        Returns the means.
    error_bound
        Largest relative error allowed.
    """

    name: str
    write: Callable[[], None]
    run: Callable[[], None]
    result: Callable[[], Tensor]
    error_bound: float


def scheme_methods(
    problem: AveragingProblem, algorithm: str, compressors: Mapping[str, Compressor | None]
) -> Iterator[ReductionMethod]:
    """float32 and each scheme, reduced by hpcsgd; collective."""
    world = problem.world

    def write() -> None:
        problem.write()
        world.activity.step += 1

    def reduce_with(compressor: Compressor | None) -> Callable[[], None]:
        reduce = make_reducer(problem.group, algorithm, compressor)

        def run() -> None:
            for bucket in problem.group:
                reduce.start(bucket, 1.0 / world.size)
            reduce.finish()

        return run

    for name, compressor in {FLOAT32: None, **compressors}.items():
        bound = error_bound(compressor, problem.numel)
        yield ReductionMethod(name, write, reduce_with(compressor), problem.result, bound)


def baseline_methods(problem: AveragingProblem) -> Iterator[ReductionMethod]:
    """DDP's hooks over gloo, and gloo alone, on a flat buffer. Call it inside `baselines.gloo`."""
    flat = problem.flat
    runs = {**ddp_hooks.hooks(flat, problem.tensors), GLOO: lambda: baselines.gloo_mean(flat)}
    limits = {
        GLOO: error_bound(None, 0),
        ddp_hooks.FP16: error_bound(FP16(), 0),
        ddp_hooks.POWERSGD: math.inf,
    }
    for name, run in runs.items():
        yield ReductionMethod(name, problem.write_flat, run, lambda: flat, limits[name])


def memory_copy(problem: AveragingProblem) -> Callable[[], None]:
    """Return a function that copies `problem.flat`."""
    return partial(np.copyto, torch.empty_like(problem.flat).numpy(), problem.flat.numpy())
