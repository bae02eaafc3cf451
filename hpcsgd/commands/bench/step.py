"""`hpcsgd bench step`: a training step with hpcsgd, with DDP over gloo, and without communication."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpcsgd.commands.bench import baselines, output
from hpcsgd.commands.bench.step_loop import (
    StepLoop,
    check_equal,
    make_batches,
    max_difference,
    plain_loop,
    sgd,
)
from hpcsgd.commands.bench.timing import Contender, check_positive, interleave
from hpcsgd.mpi.world import World
from hpcsgd.strategies import AllReduce
from hpcsgd.training.data import load
from hpcsgd.training.models import build
from hpcsgd.training.run import Run

MODELS = ("resnet18", "gpt")
HPCSGD, DDP, NO_COMMUNICATION = "hpcsgd", "DDP-gloo", "no communication"
_IMAGES, _TEXT = "synthetic:shape=3x32x32,samples=1024", "text:limit=1"


def main(
    models: Sequence[str] = MODELS,
    batch: int = 16,
    repeats: int = 5,
    steps: int = 3,
    csv: str | Path | None = None,
    seed: int = 0,
) -> None:
    """Time training steps on the ranks of this job; rank 0 prints a table.

    The same model, with the same batches and optimizer (SGD with momentum), is trained with `AllReduce`, with
    DistributedDataParallel over gloo, and on each rank alone. Blocks of steps of the three alternate; a time
    is that of the slowest rank, the median over the blocks.

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

    Raises
    ------
    HpcsgdError
        On all ranks, if hpcsgd and DDP do not train the same model, or `csv` cannot be written.
    """
    check_positive("batch, repeats and steps", [batch, repeats, steps])
    path = None if csv is None else Path(csv)
    with World(device="cpu") as world:
        output.check_writable(world, path)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(world.local.threads)
        results = [_measure(world, spec, batch, repeats, steps, seed) for spec in models]
        if world.rank == 0:
            _report(world, results, batch)
            if path is not None:
                output.write_csv(path, _rows(world, results, batch))


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


def _measure(world: World, spec: str, batch: int, repeats: int, steps: int, seed: int) -> StepResult:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    data = load(_TEXT if spec.split(":")[0] == "gpt" else _IMAGES)
    torch.manual_seed(seed)
    model = build(spec, data)
    batches = make_batches(world, data, batch, 1 + repeats * (1 + steps))
    with baselines.gloo(world):
        # A function of its own, whose DDP is gone before gloo ends: a reducer that outlives the process group
        # ends its threads while it holds Python's lock, which one of them may wait for.
        distance, result = _compare(world, comm, spec, model, batches, repeats, steps)
    comm.Free()
    # After gloo is shut down: gloo has been seen to hang while an error still refers to its models.
    check_equal(spec, distance)
    return result


def _compare(
    world: World, comm: Any, spec: str, model: nn.Module, batches: Any, repeats: int, steps: int
) -> tuple[float, StepResult]:
    """Return the largest difference of the models of hpcsgd and DDP, and the times."""
    local_loop = plain_loop(copy.deepcopy(model), batches)
    ddp_loop = plain_loop(DistributedDataParallel(copy.deepcopy(model)), batches)
    optimizer, strategy = sgd(model), AllReduce()
    run = Run(model, optimizer, strategy, comm=world)
    hpcsgd_loop = StepLoop(model, optimizer, iter(run.batches(batches)), run.step)
    for contender in (hpcsgd_loop, ddp_loop, local_loop):
        contender.train(1)
    distance = max_difference(world, hpcsgd_loop.model, ddp_loop.model)
    before = _communication(world)
    contenders = [
        _timed(HPCSGD, hpcsgd_loop, steps),
        _timed(DDP, ddp_loop, steps),
        _timed(NO_COMMUNICATION, local_loop, steps),
    ]
    seconds = interleave(comm, contenders, repeats, warmups=0, timed_calls=1)
    busy, waited = _communication(world) - before
    buffers = strategy.gradients.group.nbytes
    run.close()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    hidden = 1 - waited / busy if busy else 1.0  # one rank exchanges nothing, and waits for nothing
    return distance, StepResult(spec, seconds, hidden, buffers, gradients)


def _timed(name: str, trainer: StepLoop, steps: int) -> Contender:
    # The first step finds the caches as the previous contender left them.
    return Contender(name, lambda: trainer.train(1), lambda: trainer.train(steps), steps)


def _communication(world: World) -> np.ndarray:
    """Seconds of communication, and of compute threads waiting for it, summed over the ranks; collective."""
    progress = world.progress
    seconds = world.gather((progress.busy_seconds, progress.wait_seconds), "communication times")
    total: np.ndarray = np.array(seconds).sum(axis=0)
    return total


def _report(world: World, results: Sequence[StepResult], batch: int) -> None:
    lines = []
    for result in results:
        t = {name: float(np.median(seconds)) for name, seconds in result.seconds.items()}
        lines.append(
            [
                result.model,
                *(f"{1e3 * t[name]:.1f}" for name in (HPCSGD, DDP, NO_COMMUNICATION)),
                f"{t[HPCSGD] / t[DDP]:.2f}",
                f"{result.hidden:.0%}",
                f"{result.buffers / 2**20:.1f}",
                f"{result.gradients / 2**20:.1f}",
            ]
        )
    header = ["model", *(f"{name}\nms" for name in (HPCSGD, DDP, NO_COMMUNICATION)), "hpcsgd /\nDDP-gloo"]
    header += ["communication\nhidden", "hpcsgd buffers\nMiB", "gradients\nMiB"]
    title = f"training step, batch {batch} per rank, {output.describe_ranks(world)}"
    notes = f"{torch.get_num_threads()} compute thread(s) per rank, {os.cpu_count()} cores"
    output.print_table(title, header, lines, notes)


def _rows(world: World, results: Sequence[StepResult], batch: int) -> list[output.Row]:
    environment = output.environment(world)
    return [
        {
            "model": result.model,
            "contender": name,
            "batch": batch,
            **output.milliseconds(seconds),
            "hidden": round(result.hidden, 4) if name == HPCSGD else "",
            "buffer_bytes": result.buffers if name == HPCSGD else "",
            "gradient_bytes": result.gradients,
            **environment,
        }
        for result in results
        for name, seconds in result.seconds.items()
    ]
