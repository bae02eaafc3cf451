"""`hpcsgd bench trace`: the overhead of tracing a training step."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.options import TraceOptions
from hpcsgd.commands.bench.output import Column, Results
from hpcsgd.commands.bench.step_loop import StepLoop, make_batches, sgd
from hpcsgd.commands.bench.timing import Contender, interleave
from hpcsgd.diagnostics.trace import NullTracer, Tracer
from hpcsgd.mpi.world import World
from hpcsgd.training.data import load
from hpcsgd.training.models import build
from hpcsgd.training.run import Run

_OFF, _ON = "off", "on"
_CALLS = 10_000
_DATA = "synthetic:shape=1x28x28,samples=1024"


def main(options: TraceOptions) -> None:
    """Time training steps on the ranks of this job with and without a trace; rank 0 prints a table.

    One model is trained with all-reduce; blocks of steps with and without a trace alternate, and each traced
    block is compared to the untraced block before it; one step before each block is not timed. On a noisy
    machine the number of events and the processor time per event are the more precise measurement.
    """
    from mpi4py import MPI

    comm, steps, repeats = MPI.COMM_WORLD.Dup(), options.steps, options.repeats
    with World(device="cpu") as world, tempfile.TemporaryDirectory() as folder:
        world.start_trace(Path(world.gather(folder)[0]) / "trace")
        trace = world.tracer
        assert isinstance(trace, Tracer)
        training = _TracedRun(world, options)
        contenders = [
            Contender(name, partial(training.prepare, tracer), partial(training.train, steps), steps)
            for name, tracer in ((_OFF, NullTracer()), (_ON, trace))
        ]
        before = trace.count
        seconds = interleave(comm, contenders, repeats, warmups=0, timed_calls=1)
        events = (trace.count - before) / (repeats * (1 + steps))
        cost = _cost(trace)
        if world.rank == 0:
            model = f"{options.model}, batch {options.batch} per rank, {output.describe_ranks(world)}"
            title, threads = f"training step with and without a trace, {model}", torch.get_num_threads()
            notes = f"{repeats} blocks of each, alternating; {threads} compute thread(s) per rank"
            Results(COLUMNS, [_TraceResult(seconds[_OFF], seconds[_ON], events, cost)], title, notes).show()
        training.run.close()
        world.waiter.tracer = trace
        world.close()
    comm.Free()


@dataclass(frozen=True)
class _TraceResult:
    """Seconds per step without and with the trace, events per step, and processor seconds per event."""

    off: np.ndarray
    on: np.ndarray
    events: float
    cost: float

    @property
    def ratio(self) -> tuple[float, float, float]:
        return _median(np.sort(self.on / self.off))


COLUMNS: list[Column[_TraceResult]] = [
    Column(lambda r: 1e3 * np.median(r.off), heading="ms per step\noff", form=".3f"),
    Column(lambda r: 1e3 * np.median(r.on), heading="\non", form=".3f"),
    Column(lambda r: r.ratio[0], heading="on / off,\nmedian", form=".3f"),
    Column(lambda r: r.ratio[1], heading="95 % interval:\nfrom", form=".3f"),
    Column(lambda r: r.ratio[2], heading="\nto", form=".3f"),
    Column(lambda r: r.events, heading="events\nper step", form=".1f"),
    Column(lambda r: 1e6 * r.cost, heading="processor, µs\nper event", form=".2f"),
    Column(lambda r: r.events * r.cost / np.median(r.off), heading="share of\na step", form=".2%"),
]


class _TracedRun:
    """One run whose trace is switched on and off, so that both cases use the same memory and threads."""

    def __init__(self, world: World, options: TraceOptions) -> None:
        torch.manual_seed(0)
        source = load(_DATA)
        model = build(options.model, source)
        optimizer = sgd(model)
        self._world, self.run = world, Run(model, optimizer, comm=world)
        self._loader = make_batches(world, source, options.batch, 1 + options.steps)

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


def _median(ratios: np.ndarray) -> tuple[float, float, float]:
    """Median of sorted numbers, and its 95 % confidence interval, which assumes no distribution."""
    half = 0.98 * math.sqrt(len(ratios))
    last = len(ratios) - 1
    low, high = max(0, math.floor(last / 2 - half)), min(last, math.ceil(last / 2 + half))
    return float(np.median(ratios)), float(ratios[low]), float(ratios[high])
