"""The methods that `hpcsgd bench compress` compares: each scheme, float32, gloo and torch's DDP hooks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcsgd.collectives.reducer import make_reducer
from hpcsgd.commands.bench import baselines
from hpcsgd.commands.bench.compress import ddp_hooks
from hpcsgd.commands.bench.compress.problem import AveragingProblem
from hpcsgd.commands.bench.timing import Contender, with_barrier
from hpcsgd.compress.base import Compressor
from hpcsgd.compress.error_feedback import ErrorFeedback
from hpcsgd.compress.float32 import Float32
from hpcsgd.compress.hadamard import Hadamard
from hpcsgd.compress.half import FP16
from hpcsgd.compress.maxnorm import QSGDMaxNorm
from hpcsgd.compress.multiscale import QSGDMaxNormMultiScale
from hpcsgd.compress.randk import GlobalRandK, GlobalRandKMaxNorm, GlobalRandKMaxNormMultiScale

_FLOAT32_BOUND = 1e-5
FLOAT32, GLOO, COPY = "float32", "gloo float32", "memory copy"


@dataclass(kw_only=True)
class ReductionMethod(Contender):
    """A method of averaging the gradients, which `prepare` writes, and the largest relative error allowed."""

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
        bound, run = error_bound(compressor, problem.numel), reduce_with(compressor)
        yield ReductionMethod(name=name, prepare=write, run=run, result=problem.result, error_bound=bound)


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
        yield ReductionMethod(
            name=name, prepare=problem.write_flat, run=run, result=lambda: flat, error_bound=limits[name]
        )


def memory_copy(problem: AveragingProblem, comm: Any) -> Contender:
    """A copy of `problem.flat`."""
    copy = partial(np.copyto, torch.empty_like(problem.flat).numpy(), problem.flat.numpy())
    return Contender(COPY, problem.write_flat, with_barrier(comm, copy))


def error_bound(compressor: Compressor | None, numel: int) -> float:
    """A bound on the relative error of the mean that only a bug can exceed; infinite for a biased scheme."""
    feedback = False
    while isinstance(compressor, ErrorFeedback | Hadamard):
        feedback = feedback or isinstance(compressor, ErrorFeedback)
        compressor = compressor.inner
    match compressor:
        case None | Float32():
            return _FLOAT32_BOUND
        case FP16():
            return 4 * torch.finfo(compressor.dtype).eps
        case QSGDMaxNorm() | QSGDMaxNormMultiScale():
            return _bound_for_levels(compressor.levels[0], compressor.scale, compressor.norm)
        case GlobalRandK() | GlobalRandKMaxNorm() | GlobalRandKMaxNormMultiScale() if not feedback:
            inner = error_bound(compressor.inner, numel)
            share = compressor.ratio if compressor.k is None else min(1.0, compressor.k / numel)
            return 2 * (1 + inner) / math.sqrt(share)
        case _:
            return math.inf


def _bound_for_levels(levels: int, scale: str, norm: str) -> float:
    """At most half a level per element; the size of a level is the ratio of the norm to a typical element."""
    return (2 if (scale, norm) == ("block", "max") else 40) / levels
