"""`hpcsgd bench step`: a training step with us, with DDP over gloo, and without communication."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from hpcsgd.commands.bench import baselines, output
from hpcsgd.commands.bench.timing import Contender, check_positive, interleave
from hpcsgd.commands.bench.trainers import Trainer, check_same, difference, draw, sgd, trainer
from hpcsgd.mpi.world import World
from hpcsgd.strategies import AllReduce
from hpcsgd.training.data import load
from hpcsgd.training.models import build
from hpcsgd.training.run import Run

MODELS = ("resnet18", "gpt")
OURS, DDP, ALONE = "hpcsgd", "DDP-gloo", "no communication"
_IMAGES, _TEXT = "synthetic:shape=3x32x32,samples=1024", "text:limit=1"


def main(
    models: Sequence[str] = MODELS,
    batch: int = 16,
    repeats: int = 5,
    steps: int = 3,
    csv: str | Path | None = None,
    seed: int = 0,
) -> None:
    """Compare training steps on the ranks of this job; rank 0 prints a table.

    The same model with the same batches and optimizer (SGD with momentum) is trained by
    `AllReduce`, by DistributedDataParallel over gloo, and by each rank alone. They take turns in
    blocks of steps; a time is that of the slowest rank, the median over the blocks.

    Parameters
    ----------
    models
        Specs as of `hpcsgd.training.models.build`; "gpt" gets text, all others images of 3x32x32. Default
        ResNet-18 and the small GPT.
    batch
        Samples per rank and step. Default 16.
    repeats
        Blocks of each contender, at least 1. Default 5.
    steps
        Steps in a block, at least 1. One more before each is not timed. Default 3.
    csv
        A file to write, one line per model and contender. Default: none.
    seed
        Of the models' weights.

    Raises
    ------
    HpcsgdError
        On all ranks, where we and DDP do not train the same model, or `csv` cannot be written.
    """
    check_positive("batch, repeats and steps", [batch, repeats, steps])
    path = None if csv is None else Path(csv)
    with World(device="cpu") as world:
        output.check_writable(world, path)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(world.threads)
        results = [_measure(world, spec, batch, repeats, steps, seed) for spec in models]
        if world.rank == 0:
            _report(world, results, batch)
            if path is not None:
                output.write_csv(path, _rows(world, results, batch))


@dataclass
class Result:
    """What was measured for one model.

    Attributes
    ----------
    seconds
        Of one step, per contender and block.
    hidden
        Share of the communication that the compute thread did not wait for.
    buffers, gradients
        Bytes of our group buffers and of the model's gradients.
    """

    model: str
    seconds: dict[str, np.ndarray]
    hidden: float
    buffers: int
    gradients: int


def _measure(world: World, spec: str, batch: int, repeats: int, steps: int, seed: int) -> Result:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    data = load(_TEXT if spec.split(":")[0] == "gpt" else _IMAGES)
    torch.manual_seed(seed)
    model = build(spec, data)
    batches = draw(world, data, batch, 1 + repeats * (1 + steps))
    with baselines.gloo(world):
        alone = trainer(copy.deepcopy(model), batches)
        ddp = trainer(DistributedDataParallel(copy.deepcopy(model)), batches)
        optimizer, strategy = sgd(model), AllReduce()
        run = Run(model, optimizer, strategy, comm=world)
        ours = Trainer(model, optimizer, iter(run.batches(batches)), run.step)
        for contender in (ours, ddp, alone):
            contender.train(1)
        distance = difference(world, ours.model, ddp.model)
        before = _communication(world)
        contenders = [
            _timed(OURS, ours, steps),
            _timed(DDP, ddp, steps),
            _timed(ALONE, alone, steps),
        ]
        seconds = interleave(comm, contenders, repeats, uncounted=0, takes=1)
        busy, waited = _communication(world) - before
        buffers = strategy.gradients.group.nbytes
        run.close()
    comm.Free()
    # Not before gloo is down: with its models still referred to by an error it has been seen to hang.
    check_same(spec, distance)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    return Result(spec, seconds, 1 - waited / busy, buffers, gradients)


def _timed(name: str, trainer: Trainer, steps: int) -> Contender:
    # The first step finds the caches as the contender before left them.
    return Contender(name, lambda: trainer.train(1), lambda: trainer.train(steps), steps)


def _communication(world: World) -> np.ndarray:
    """Seconds that communication took, and that compute threads waited for it; over all ranks."""
    progress = world.progress
    seconds = world.gather((progress.busy_seconds, progress.wait_seconds), "communication times")
    total: np.ndarray = np.array(seconds).sum(axis=0)
    return total


def _report(world: World, results: Sequence[Result], batch: int) -> None:
    lines = []
    for result in results:
        t = {name: float(np.median(seconds)) for name, seconds in result.seconds.items()}
        lines.append(
            [
                result.model,
                *(f"{1e3 * t[name]:.1f}" for name in (OURS, DDP, ALONE)),
                f"{t[OURS] / t[DDP]:.2f}",
                f"{result.hidden:.0%}",
                f"{result.buffers / 2**20:.1f}",
                f"{result.gradients / 2**20:.1f}",
            ]
        )
    header = ["model", *(f"{name}\nms" for name in (OURS, DDP, ALONE)), "hpcsgd /\nDDP-gloo"]
    header += ["communication\nhidden", "our buffers\nMiB", "gradients\nMiB"]
    title = f"training step, batch {batch} a rank, {output.layout(world)}"
    notes = f"{torch.get_num_threads()} compute thread(s) a rank, {os.cpu_count()} cores"
    output.show(title, header, lines, notes)


def _rows(world: World, results: Sequence[Result], batch: int) -> list[output.Row]:
    facts = output.facts(world)
    return [
        {
            "model": result.model,
            "contender": name,
            "batch": batch,
            **output.milliseconds(seconds),
            "hidden": round(result.hidden, 4) if name == OURS else "",
            "buffer_bytes": result.buffers if name == OURS else "",
            "gradient_bytes": result.gradients,
            **facts,
        }
        for result in results
        for name, seconds in result.seconds.items()
    ]
