"""`hpcsgd bench trace`: what a trace costs a training step."""

from __future__ import annotations

import math
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.timing import Contender, check_positive, interleave
from hpcsgd.commands.bench.trainers import Trainer, draw, sgd
from hpcsgd.diagnostics.trace import Off, Trace
from hpcsgd.mpi.world import World
from hpcsgd.training.data import load
from hpcsgd.training.models import build
from hpcsgd.training.run import Run

_OFF, _ON = "off", "on"
_CALLS = 10_000


def main(
    model: str = "2nn:width=1024",
    data: str = "synthetic:shape=1x28x28,samples=1024",
    batch: int = 32,
    repeats: int = 40,
    steps: int = 5,
) -> None:
    """Compare the training steps of this job's ranks with a trace, and without; rank 0 prints a table.

    One model is trained by all-reduce, in turns with a trace and without. Each block of steps with a trace is
    compared to the one before it. Where the machine disturbs these too much, the number of events and the
    processor time of one tell more.

    Parameters
    ----------
    model, data
        As of `hpcsgd train`. Default: a perceptron of 1.86 M parameters on random images.
    batch
        Samples per rank and step. Default 32.
    repeats
        Blocks of each, at least 1. Default 40.
    steps
        Steps in a block, at least 1. One more before each is not timed. Default 5.
    """
    from mpi4py import MPI

    check_positive("batch, repeats and steps", [batch, repeats, steps])
    comm = MPI.COMM_WORLD.Dup()
    with World(device="cpu") as world, tempfile.TemporaryDirectory() as folder:
        world.trace_into(Path(world.gather(folder)[0]) / "trace")
        trace = world.trace
        assert isinstance(trace, Trace)
        training = _Training(world, model, data, batch, 1 + steps)
        contenders = [
            Contender(name, partial(training.prepare, its), partial(training.train, steps), steps)
            for name, its in ((_OFF, Off()), (_ON, trace))
        ]
        before = trace.count
        seconds = interleave(comm, contenders, repeats, uncounted=0, takes=1)
        events = (trace.count - before) / (repeats * (1 + steps))
        cost = _cost(trace)
        if world.rank == 0:
            _report(world, f"{model}, batch {batch}", seconds, events, cost)
        training.run.close()
        world.waiter.trace = trace
        world.close()
    comm.Free()


class _Training:
    """One run, which is traced at times; so the two ways have the same memory and threads."""

    def __init__(self, world: World, spec: str, data: str, batch: int, steps: int) -> None:
        torch.manual_seed(0)
        source = load(data)
        model = build(spec, source)
        optimizer = sgd(model)
        self._world, self.run = world, Run(model, optimizer, comm=world)
        self._loader = draw(world, source, batch, steps)

    def prepare(self, trace: Off) -> None:
        """Go on with a trace, or without."""
        self._world.waiter.trace = trace
        run = self.run
        self._trainer = Trainer(run.model, run.optimizer, run.batches(self._loader), run.step)
        self.train(1)

    def train(self, steps: int) -> None:
        self._trainer.train(steps)


def _cost(trace: Trace) -> float:
    """Processor seconds of an event of the dearest kind, with its way to the file."""
    began = time.thread_time()
    for _ in range(_CALLS):
        with trace.span("all-reduce of bucket 0 at step 0", "communication"):
            pass
    return (time.thread_time() - began) / _CALLS


def _report(world: World, what: str, seconds: dict[str, np.ndarray], events: float, cost: float) -> None:
    off, on = seconds[_OFF], seconds[_ON]
    median, low, high = _median(np.sort(on / off))
    step = float(np.median(off))
    header = ["", "median of\na step, ms", "on / off,\nmedian", "95 % sure:\nfrom", "\nto"]
    header += ["events\na step", "processor, µs\nan event", "share of\na step"]
    rows = [
        [_OFF, f"{1e3 * step:.3f}", *[""] * 6],
        [
            *(_ON, f"{1e3 * np.median(on):.3f}", f"{median:.3f}", f"{low:.3f}", f"{high:.3f}"),
            *(f"{events:.1f}", f"{1e6 * cost:.2f}", f"{events * cost / step:.2%}"),
        ],
    ]
    title = f"a step with a trace, {what} a rank, {output.layout(world)}"
    output.show(
        title, header, rows, f"{len(off)} blocks of each in turns, {torch.get_num_threads()} thread(s)"
    )


def _median(ratios: np.ndarray) -> tuple[float, float, float]:
    """Of sorted numbers, with the bounds of 95 % confidence, which presume no distribution."""
    half = 0.98 * math.sqrt(len(ratios))
    last = len(ratios) - 1
    low, high = max(0, math.floor(last / 2 - half)), min(last, math.ceil(last / 2 + half))
    return float(np.median(ratios)), float(ratios[low]), float(ratios[high])
