"""`hpcsgd bench step`: a training step with hpcsgd, with DDP over gloo, and without communication."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpcsgd.commands.bench import baselines, devices, output
from hpcsgd.commands.bench.step_loop import (
    StepLoop,
    check_equal,
    make_batches,
    max_difference,
    plain_loop,
    sgd,
)
from hpcsgd.commands.bench.timing import Contender, interleave
from hpcsgd.mpi.world import World
from hpcsgd.strategies.allreduce import AllReduce
from hpcsgd.tensors.group import DEFAULT_BUCKET_MIB
from hpcsgd.training.data import load
from hpcsgd.training.models import build
from hpcsgd.training.run import Run

MODELS = ("resnet18", "gpt")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HPCSGD, DDP, NO_COMMUNICATION = "hpcsgd", "DDP-gloo", "no communication"
_IMAGES, _TEXT = "synthetic:shape=3x32x32,samples=1024", "text:limit=1,context={}"


def main(
    models: Sequence[str] = MODELS,
    batch: int = 16,
    repeats: int = 5,
    steps: int = 3,
    csv: str | Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    context: int = 64,
    compress: str | None = None,
    bucket_mib: float = DEFAULT_BUCKET_MIB,
) -> None:
    """Time training steps on the ranks of this job; rank 0 prints a table.

    The same model, with the same batches and optimizer (SGD with momentum), is trained with `AllReduce`, with
    DistributedDataParallel over gloo, and on each rank alone. Blocks of steps of the three alternate; a time
    is that of the slowest rank, the median over the blocks.

    The cost of communication is the time beyond that of no communication, in which as many ranks compute at
    once: where ranks share a GPU, both times contain the compute of all of them.

    Parameters
    ----------
    models
        Specs for `hpcsgd.training.models.build`; "gpt" is trained on text, all others on 3x32x32 images.
        Default: ResNet-18 and the small GPT.
    batch
        Samples per rank and step. Default 16.
    repeats
        Blocks per contender, at least 1. Default 5.
    steps
        Steps per block, at least 1; one step before each block is not timed. Default 3.
    csv
        A CSV file with a line per model and contender. Default: none.
    seed
        Seed of the initial weights. Default 0.
    device
        "cpu" (default) or "cuda"; the batches are there before the first step.
    dtype
        Type of parameters, gradients, optimizer state and images: "float32" (default) or "bfloat16", which
        the gloo of an older torch cannot add ("Invalid scalar type", pytorch #111131).
    context
        Tokens per sample of "gpt". Default 64.
    compress
        Scheme of one more contender, "hpcsgd, SCHEME", see `hpcsgd.compress`. Default: none.
    bucket_mib
        Size of hpcsgd's buckets in MiB. Default: that of `Run`, 4; DDP has its own.

    Raises
    ------
    BadOption
        Torch cannot use the device.
    HpcsgdError
        On all ranks, if hpcsgd and DDP do not train the same model, or `csv` cannot be written.
    """
    devices.check_device(device)
    path = None if csv is None else Path(csv)
    settings = _Settings(batch, repeats, steps, seed, DTYPES[dtype], context, compress, bucket_mib)
    with World(device=device) as world:
        output.check_writable(world, path)
        devices.select_device(world.device)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(world.local.threads)
        results = [_measure(world, spec, settings) for spec in models]
        if world.rank == 0:
            _report(world, results, settings)
            if path is not None:
                output.write_csv(path, _rows(world, results, settings))


@dataclass
class _Settings:
    """The options of `main` that all models share."""

    batch: int
    repeats: int
    steps: int
    seed: int
    dtype: torch.dtype
    context: int
    compress: str | None
    bucket_mib: float

    def describe(self, world: World) -> str:
        """Batch and, where it is no float32 on a CPU, dtype and device, for a title."""
        kind = "" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"batch {self.batch} per rank{kind}{f', {world.device.type}' * (world.device.type != 'cpu')}"


@dataclass
class StepResult:
    """Measurements of one model.

    Attributes
    ----------
    model
        Spec of the model.
    seconds
        Seconds per step of each contender, (blocks,).
    hidden
        Share of the communication time for which the compute thread did not wait.
    buffers, gradients
        Bytes of hpcsgd's group buffers and of the model's gradients.
    """

    model: str
    seconds: dict[str, np.ndarray]
    hidden: float
    buffers: int
    gradients: int

    def median(self, name: str) -> float:
        """The median time of a contender in seconds."""
        return float(np.median(self.seconds[name]))


def _measure(world: World, spec: str, settings: _Settings) -> StepResult:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    data = load(_TEXT.format(settings.context) if spec.split(":")[0] == "gpt" else _IMAGES)
    torch.manual_seed(settings.seed)
    model = build(spec, data).to(world.device, settings.dtype)
    steps = 1 + settings.repeats * (1 + settings.steps)
    batches = make_batches(world, data, settings.batch, steps, settings.dtype)
    with baselines.gloo(world):
        # A function of its own, whose DDP is gone before gloo ends: a reducer that outlives the process group
        # ends its threads while it holds Python's lock, which one of them may wait for.
        distance, result = _compare(world, comm, spec, model, batches, settings)
    comm.Free()
    # After gloo is shut down: gloo has been seen to hang while an error still refers to its models.
    check_equal(spec, distance, settings.dtype)
    return result


def _compare(
    world: World, comm: Any, spec: str, model: nn.Module, batches: Any, settings: _Settings
) -> tuple[float, StepResult]:
    """Return the largest difference of the models of hpcsgd and DDP, and the times."""
    local_loop = plain_loop(copy.deepcopy(model), batches)
    ddp_loop = plain_loop(DistributedDataParallel(copy.deepcopy(model)), batches)
    models = [model] if settings.compress is None else [model, copy.deepcopy(model)]
    strategy = AllReduce()
    run = Run(model, sgd(model), strategy, comm=world, bucket_mib=settings.bucket_mib)
    loops, runs = {HPCSGD: _loop_of(run, batches)}, [run]
    if settings.compress is not None:
        # A world of its own, which Run makes because the first run of this one is open.
        size, scheme = settings.bucket_mib, settings.compress
        runs.append(Run(models[1], sgd(models[1]), comm=world, bucket_mib=size, compress=scheme))
        loops[compressed_name(settings.compress)] = _loop_of(runs[-1], batches)
    loops |= {DDP: ddp_loop, NO_COMMUNICATION: local_loop}
    for loop in loops.values():
        loop.train(1)
    distance = max_difference(world, loops[HPCSGD].model, ddp_loop.model)
    before = _communication(world)
    contenders = [_timed(name, loop, settings.steps, world.device) for name, loop in loops.items()]
    seconds = interleave(comm, contenders, settings.repeats, warmups=0, timed_calls=1)
    busy, waited = _communication(world) - before
    buffers = strategy.gradients.group.nbytes
    for each in reversed(runs):
        each.close()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    hidden = 1 - waited / busy if busy else 1.0  # one rank exchanges nothing, and waits for nothing
    return distance, StepResult(spec, seconds, hidden, buffers, gradients)


def compressed_name(scheme: str) -> str:
    """The name of the contender with compressed gradients."""
    return f"{HPCSGD}, {scheme}"


def _loop_of(run: Run, batches: Any) -> StepLoop:
    return StepLoop(run.model, run.optimizer, iter(run.batches(batches)), run.step)


def _timed(name: str, trainer: StepLoop, steps: int, device: torch.device) -> Contender:
    # The first step finds the caches as the previous contender left them.
    def train(steps: int) -> Callable[[], None]:
        return devices.synchronized(device, lambda: trainer.train(steps))

    return Contender(name, train(1), train(steps), steps)


def _communication(world: World) -> np.ndarray:
    """Seconds of communication, and of compute threads waiting for it, summed over the ranks; collective."""
    progress = world.progress
    seconds = world.gather((progress.busy_seconds, progress.wait_seconds), "communication times")
    total: np.ndarray = np.array(seconds).sum(axis=0)
    return total


def _report(world: World, results: Sequence[StepResult], settings: _Settings) -> None:
    names = list(results[0].seconds)
    costly = [name for name in names if name != NO_COMMUNICATION]
    lines = []
    for result in results:
        t = {name: result.median(name) for name in names}
        lines.append(
            [
                result.model,
                *(f"{1e3 * t[name]:.1f}" for name in names),
                f"{t[HPCSGD] / t[DDP]:.2f}",
                *(f"{t[name] / t[NO_COMMUNICATION] - 1:+.1%}" for name in costly),
                f"{result.hidden:.0%}",
                f"{result.buffers / 2**20:.1f}",
                f"{result.gradients / 2**20:.1f}",
            ]
        )
    header = ["model", *(f"{name}\nms" for name in names), "hpcsgd /\nDDP-gloo"]
    header += [f"cost of\n{name}" for name in costly]
    header += ["communication\nhidden", "hpcsgd buffers\nMiB", "gradients\nMiB"]
    title = f"training step, {settings.describe(world)}, {output.describe_ranks(world)}"
    notes = (
        f"{torch.get_num_threads()} compute thread(s) per rank, {os.cpu_count()} cores. cost: time beyond "
    )
    notes += "that of no communication by as many ranks"
    output.print_table(title, header, lines, notes)


def _rows(world: World, results: Sequence[StepResult], settings: _Settings) -> list[output.Row]:
    environment = output.environment(world)
    dtype = str(settings.dtype).removeprefix("torch.")
    return [
        {
            "model": result.model,
            "contender": name,
            "batch": settings.batch,
            "dtype": dtype,
            "device": world.device.type,
            **output.milliseconds(seconds),
            "times_no_communication": round(result.median(name) / result.median(NO_COMMUNICATION), 4),
            "hidden": round(result.hidden, 4) if name == HPCSGD else "",
            "buffer_bytes": result.buffers if name == HPCSGD else "",
            "gradient_bytes": result.gradients,
            **environment,
        }
        for result in results
        for name, seconds in result.seconds.items()
    ]
