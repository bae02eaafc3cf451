"""`hpcsgd bench step`: a training step with hpcsgd, with DDP over gloo, and without communication."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpcsgd.commands.bench import baselines, devices, output
from hpcsgd.commands.bench.options import StepOptions
from hpcsgd.commands.bench.output import Column, Results, Timed, times
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
from hpcsgd.training.data import load
from hpcsgd.training.models import build
from hpcsgd.training.run import Run

HPCSGD, DDP, NO_COMMUNICATION = "hpcsgd", "DDP-gloo", "no communication"
_IMAGES, _TEXT = "synthetic:shape=3x32x32,samples=1024", "text:limit=1,context={}"


@dataclass(frozen=True)
class StepResult(Timed):
    """Measurements of one model with one contender."""

    model: str
    contender: str
    seconds: np.ndarray  # per step, (blocks,)
    ddp: float  # median seconds of DDP
    alone: float  # median seconds of no communication
    gradients: int  # bytes
    # Of hpcsgd: share of the communication for which the compute thread did not wait; bytes of its buffers.
    hidden: float | None
    buffers: int | None


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"


def _columns(options: StepOptions) -> list[Column[StepResult]]:
    return [
        Column(lambda r: r.model, "model", "model"),
        Column(lambda r: r.contender, "contender", "contender"),
        Column(lambda _: options.batch, "batch"),
        Column(lambda _: options.dtype, "dtype"),
        Column(lambda _: options.device, "device"),
        *times(lambda r: r.seconds, form=".1f"),
        Column(lambda r: r.median / r.ddp, heading="relative to\nDDP-gloo", form=".2f"),
        Column(lambda r: r.median / r.alone, "times_no_communication"),
        Column(lambda r: r.median / r.alone - 1, heading="cost", form="+.1%"),
        Column(lambda r: r.hidden, "hidden", "communication\nhidden", ".0%"),
        Column(lambda r: r.buffers, "buffer_bytes", "buffers\nMiB", _mib),
        Column(lambda r: r.gradients, "gradient_bytes", "gradients\nMiB", _mib),
    ]


def main(options: StepOptions) -> None:
    """Time training steps on the ranks of this job; rank 0 prints a table.

    The same model, with the same batches and optimizer (SGD with momentum), is trained with `AllReduce`, with
    DistributedDataParallel over gloo, and on each rank alone; "gpt" on text, all others on 3x32x32 images.
    Blocks of steps of the three alternate; a time is that of the slowest rank, the median over the blocks.
    One step before each block is not timed.

    The cost of communication is the time beyond that of no communication, in which as many ranks compute at
    once: where ranks share a GPU, both times contain the compute of all of them.

    Raises
    ------
    BadOption
        Torch cannot use the device.
    HpcsgdError
        On all ranks, if hpcsgd and DDP do not train the same model, or `csv` cannot be written.
    """
    with devices.open_world(options.device, options.csv) as world:
        devices.set_threads(world)
        measured = [result for spec in options.models for result in _measure(world, spec, options)]
        kind = f", {options.dtype}" * (options.dtype != "float32")
        kind += f", {options.device}" * (options.device != "cpu")
        title = f"training step, batch {options.batch} per rank{kind}, {output.describe_ranks(world)}"
        notes = f"{torch.get_num_threads()} compute thread(s) per rank, {os.cpu_count()} cores. cost: time "
        notes += "beyond that of no communication by as many ranks"
        table = Results(_columns(options), measured, title, notes)
        if world.rank == 0:
            table.show()
            output.write_csv(options.csv, table.rows(output.environment(world)))


def _measure(world: World, spec: str, options: StepOptions) -> list[StepResult]:
    from mpi4py import MPI

    comm, dtype = MPI.COMM_WORLD.Dup(), getattr(torch, options.dtype)
    data = load(_TEXT.format(options.context) if spec.split(":")[0] == "gpt" else _IMAGES)
    torch.manual_seed(0)
    model = build(spec, data).to(world.device, dtype)
    steps = 1 + options.repeats * (1 + options.steps)
    batches = make_batches(world, data, options.batch, steps, dtype)
    with baselines.gloo(world):
        # A function of its own, whose DDP is gone before gloo ends: a reducer that outlives the process group
        # ends its threads while it holds Python's lock, which one of them may wait for.
        distance, results = _compare(world, comm, spec, model, batches, options)
    comm.Free()
    # After gloo is shut down: gloo has been seen to hang while an error still refers to its models.
    check_equal(world, spec, distance, dtype)
    return results


def _compare(
    world: World, comm: Any, spec: str, model: nn.Module, batches: Any, options: StepOptions
) -> tuple[float, list[StepResult]]:
    """Return the largest difference of the models of hpcsgd and DDP, and the times."""
    local_loop = plain_loop(copy.deepcopy(model), batches)
    ddp_loop = plain_loop(DistributedDataParallel(copy.deepcopy(model)), batches)
    other = copy.deepcopy(model) if options.compress is not None else model
    strategy, size = AllReduce(), options.bucket_mib
    runs = {HPCSGD: Run(model, sgd(model), strategy, comm=world, bucket_mib=size)}
    if options.compress is not None:
        # A world of its own, which Run makes because the first run of this one is open.
        compressed = Run(other, sgd(other), comm=world, bucket_mib=size, compress=options.compress)
        runs[f"{HPCSGD}, {options.compress}"] = compressed
    loops = {name: _loop_of(run, batches) for name, run in runs.items()}
    loops |= {DDP: ddp_loop, NO_COMMUNICATION: local_loop}
    for loop in loops.values():
        loop.train(1)
    distance = max_difference(loops[HPCSGD].model, ddp_loop.model)
    before = _communication(world)
    contenders = [_timed(name, loop, options.steps, world.device) for name, loop in loops.items()]
    seconds = interleave(comm, contenders, options.repeats, warmups=0, timed_calls=1)
    busy, waited = _communication(world) - before
    buffers = strategy.gradients.group.nbytes
    for run in reversed(runs.values()):
        run.close()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    hidden = 1 - waited / busy if busy else 1.0  # one rank exchanges nothing, and waits for nothing
    ddp, alone = (float(np.median(seconds[name])) for name in (DDP, NO_COMMUNICATION))
    own = {name: (hidden, buffers) if name == HPCSGD else (None, None) for name in loops}
    return distance, [StepResult(spec, n, seconds[n], ddp, alone, gradients, *own[n]) for n in loops]


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
