"""`hpcsgd bench trace`: the overhead of tracing a training step."""

from __future__ import annotations

import math
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.step_loop import StepLoop, make_batches, sgd
from hpcsgd.commands.bench.timing import Contender, interleave
from hpcsgd.diagnostics.trace import NullTracer, Tracer
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
    """Time training steps on the ranks of this job with and without a trace; rank 0 prints a table.

    One model is trained with all-reduce; blocks of steps with and without a trace alternate, and each traced
    block is compared to the untraced block before it. On a noisy machine the number of events and the
    processor time per event are the more precise measurement.

    Parameters
    ----------
    model, data
        As for `hpcsgd train`. Default: a perceptron of 1.86 M parameters on random images.
    batch
        Samples per rank and step. Default 32.
    repeats
        Blocks of each kind, at least 1. Default 40.
    steps
        Steps per block, at least 1; one step before each block is not timed. Default 5.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    with World(device="cpu") as world, tempfile.TemporaryDirectory() as folder:
        world.start_trace(Path(world.gather(folder)[0]) / "trace")
        trace = world.tracer
        assert isinstance(trace, Tracer)
        training = _TracedRun(world, model, data, batch, 1 + steps)
        contenders = [
            Contender(name, partial(training.prepare, tracer), partial(training.train, steps), steps)
            for name, tracer in ((_OFF, NullTracer()), (_ON, trace))
        ]
        before = trace.count
        seconds = interleave(comm, contenders, repeats, warmups=0, timed_calls=1)
        events = (trace.count - before) / (repeats * (1 + steps))
        cost = _cost(trace)
        if world.rank == 0:
            _report(world, f"{model}, batch {batch}", seconds, events, cost)
        training.run.close()
        world.waiter.tracer = trace
        world.close()
    comm.Free()


class _TracedRun:
    """One run whose trace is switched on and off, so that both cases use the same memory and threads."""

    def __init__(self, world: World, spec: str, data: str, batch: int, steps: int) -> None:
        torch.manual_seed(0)
        source = load(data)
        model = build(spec, source)
        optimizer = sgd(model)
        self._world, self.run = world, Run(model, optimizer, comm=world)
        self._loader = make_batches(world, source, batch, steps)

    def prepare(self, trace: NullTracer) -> None:
        """Continue with the given tracer, and take one untimed step."""
        self._world.waiter.tracer = trace
        run = self.run
        self._trainer = StepLoop(run.model, run.optimizer, run.batches(self._loader), run.step)
        self.train(1)

    def train(self, steps: int) -> None:
        self._trainer.train(steps)


def _cost(trace: Tracer) -> float:
    """Processor seconds per span, the most expensive kind of event, including its way to the file."""
    began = time.thread_time()
    for _ in range(_CALLS):
        with trace.span("all-reduce of bucket 0 at step 0", "communication"):
            pass
    return (time.thread_time() - began) / _CALLS


def _report(world: World, workload: str, seconds: dict[str, np.ndarray], events: float, cost: float) -> None:
    off, on = seconds[_OFF], seconds[_ON]
    median, low, high = _median(np.sort(on / off))
    step = float(np.median(off))
    header = ["trace", "median\nms per step", "on / off,\nmedian", "95 % interval:\nfrom", "\nto"]
    header += ["events\nper step", "processor, µs\nper event", "share of\na step"]
    rows = [
        [_OFF, f"{1e3 * step:.3f}", *[""] * 6],
        [
            *(_ON, f"{1e3 * np.median(on):.3f}", f"{median:.3f}", f"{low:.3f}", f"{high:.3f}"),
            *(f"{events:.1f}", f"{1e6 * cost:.2f}", f"{events * cost / step:.2%}"),
        ],
    ]
    title = f"training step with and without a trace, {workload} per rank, {output.describe_ranks(world)}"
    notes = f"{len(off)} blocks of each, alternating; {torch.get_num_threads()} compute thread(s) per rank"
    output.print_table(title, header, rows, notes)


def _median(ratios: np.ndarray) -> tuple[float, float, float]:
    """Median of sorted numbers, and its 95 % confidence interval, which assumes no distribution."""
    half = 0.98 * math.sqrt(len(ratios))
    last = len(ratios) - 1
    low, high = max(0, math.floor(last / 2 - half)), min(last, math.ceil(last / 2 + half))
    return float(np.median(ratios)), float(ratios[low]), float(ratios[high])
