"""The ways to average gradients that are compared: by each scheme, uncompressed, and by torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from hpcsgd.collectives.reducer import reduction
from hpcsgd.commands.bench import baselines
from hpcsgd.commands.bench.compress import ddp_hooks
from hpcsgd.commands.bench.compress.error_bounds import limit
from hpcsgd.commands.bench.compress.problem import Problem
from hpcsgd.compress import FP16, Compressor

FLOAT32, GLOO, COPY = "float32", "gloo float32", "memory copy"


@dataclass
class Method:
    """One way to average.

    Attributes
    ----------
    write
        Puts the gradients where `run` averages them.
    result
        Returns the means.
    limit
        Of their relative error.
    """

    name: str
    write: Callable[[], None]
    run: Callable[[], None]
    result: Callable[[], Tensor]
    limit: float


def reductions(
    problem: Problem, algorithm: str, compressors: Mapping[str, Compressor | None]
) -> Iterator[Method]:
    """Ours, uncompressed and by each scheme; collective."""
    world = problem.world

    def write() -> None:
        problem.write()
        world.status.step += 1

    def by(compressor: Compressor | None) -> Callable[[], None]:
        reduce = reduction(problem.group, algorithm, compressor)

        def run() -> None:
            for bucket in problem.group:
                reduce.start(bucket, 1.0 / world.size)
            reduce.finish()

        return run

    for name, compressor in {FLOAT32: None, **compressors}.items():
        yield Method(name, write, by(compressor), problem.result, limit(compressor, problem.numel))


def peers_of(problem: Problem) -> Iterator[Method]:
    """DDP's hooks over gloo, and gloo alone, on a flat buffer; inside `peers.gloo`."""
    flat = problem.flat
    runs = {**ddp_hooks.hooks(flat, problem.tensors), GLOO: lambda: baselines.gloo_mean(flat)}
    limits = {GLOO: limit(None, 0), ddp_hooks.FP16: limit(FP16(), 0), ddp_hooks.POWERSGD: math.inf}
    for name, run in runs.items():
        yield Method(name, problem.write_flat, run, lambda: flat, limits[name])


def copy_of(problem: Problem) -> Callable[[], None]:
    """A copy of `problem.flat`."""
    return partial(np.copyto, torch.empty_like(problem.flat).numpy(), problem.flat.numpy())
