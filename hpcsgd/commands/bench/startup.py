"""`hpcsgd bench startup`: the parts of a command's start and end. Heavy imports are timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from hpcsgd.commands.bench.options import StartupOptions

if TYPE_CHECKING:
    from hpcsgd.mpi.world import World

_INTERPRETER, _INIT, _KERNELS, _WORLD, _END = "interpreter", "MPI_Init", "kernels", "World", "end"
_IMPORTS = ("numpy", "torch", "mpi4py.MPI", "numba")
#: `hpcsgd train` does without the compiler; a program that makes an optimizer of torch imports it.
_BARE_IMPORTS = (*_IMPORTS, "torch._dynamo")
_BARE = f"""
import json, sys, time
times = {{"{_INTERPRETER}": time.monotonic() - float(sys.argv[1])}}
for name in {_BARE_IMPORTS}:
    before = time.monotonic()
    __import__(name)
    times[name] = time.monotonic() - before
print(json.dumps([times, time.monotonic()]))
"""


class _Times(dict[str, float]):  # seconds of each part
    def of(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
        began = time.monotonic()
        result = part(*arguments)
        self[name] = time.monotonic() - began
        return result


def main(options: StartupOptions) -> None:
    """Time the parts of a start on the ranks of this job; rank 0 prints a table."""
    times = _Times({_INTERPRETER: _age()})
    bare = _bare_imports()
    reading, writing = os.pipe()
    rank = os.fork()  # this process can time its end
    if not rank:
        measured = _start(times, bare, options)
        with open(writing, "w") as pipe:
            json.dump([measured, time.monotonic()], pipe)
        return
    os.close(writing)
    with open(reading) as pipe:
        text = pipe.read()
    if status := os.waitpid(rank, 0)[1]:
        sys.exit(os.waitstatus_to_exitcode(status))
    results, ended = json.loads(text)
    if results is not None:
        _show(*results, end=time.monotonic() - ended, csv=options.csv)


def _age() -> float:
    """Seconds since this process began."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def _bare_imports() -> dict[str, float]:
    words = [sys.executable, "-c", _BARE, str(time.monotonic())]
    environment = {**os.environ, "MPI4PY_RC_INITIALIZE": "false"}  # MPI_Init needs a job of its own
    output = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout
    times, ended = json.loads(output)
    return {**times, _END: time.monotonic() - ended}


def _start(times: _Times, bare: dict[str, float], options: StartupOptions) -> tuple[Any, Any] | None:
    """Start as `hpcsgd train` does, and take one step; on rank 0 return the times of all ranks."""
    import_module("mpi4py").rc.initialize = False  # for a time of its own
    for name in _IMPORTS:
        times.of(name, import_module, name)
    times.of("hpcsgd", import_module, "hpcsgd.commands.train.trainer")
    from hpcsgd.commands.bench import output
    from hpcsgd.mpi import environment, start

    times.of(_INIT, start.initialize, environment.read("HPCSGD_TIMEOUT"))
    with times.of(_WORLD, _open_world, times) as world:
        times[_WORLD] -= times.get(_KERNELS, 0.0)
        output.check_writable(world, options.csv)
        times.of("first step", times.of("data, model, Run", _run, world))
        ranks = world.gather((times, bare), "the times of the start")
        return None if world.rank else (ranks, output.environment(world))


def _open_world(times: _Times) -> World:
    from hpcsgd.kernels.sums import node_reduce
    from hpcsgd.mpi.world import World

    load = node_reduce.warm_up  # called where several ranks are on a node
    node_reduce.warm_up = lambda: times.of(_KERNELS, load)
    return World(device="cpu")


def _run(world: World) -> Callable[[], None]:
    """Return a function that takes the first step of a run."""
    from hpcsgd.commands.bench.step_loop import StepLoop, make_batches
    from hpcsgd.commands.options import OPTIMIZERS
    from hpcsgd.training import data, models
    from hpcsgd.training.run import Run

    digits = data.load("digits")
    model = models.build("2nn", digits)
    run = Run(model, OPTIMIZERS["sgd"](model.parameters(), lr=0.1), comm=world)
    loop = StepLoop(model, run.optimizer, iter(run.batches(make_batches(world, digits, 32, 1))), run.step)
    return lambda: loop.train(1)


def _show(ranks: Any, about: dict[str, Any], *, end: float, csv: Path | None) -> None:
    """Print the table; `end` is that of this rank, whose own process has seen it."""
    from hpcsgd.commands.bench.output import Column, Results, count_on_nodes, write_csv

    own, bare = zip(*ranks, strict=True)
    parts = [*dict.fromkeys([*own[0], *bare[0], _END]), "sum"]
    for started, imports in ranks:
        imports["sum"] = sum(imports.values()) + started[_INIT]
        started["sum"] = sum(started.values()) + end
    own[0][_END] = end

    def column(times: Any, of: Callable[[list[float]], float], name: str, heading: str) -> Column[str]:
        known = {part: [each[part] for each in times if part in each] or [math.nan] for part in parts}
        return Column(lambda part: of(known[part]), name, heading, ".2f")

    columns = [
        Column[str](lambda part: part, "part", "part"),
        column(own, median, "median_s", "median\ns"),
        column(own, max, "max_s", "max\ns"),
        column(bare, median, "bare_median_s", "bare imports:\nmedian s"),
        column(bare, max, "bare_max_s", "\nmax s"),
    ]
    ratio, imports = columns[2].value("sum") / columns[4].value("sum"), ", ".join(_BARE_IMPORTS)
    title = f"start of a training, {count_on_nodes(about['ranks'], about['nodes'])}"
    notes = f"{ratio:.2f} times the bare imports, python -c 'import {imports}', all ranks at once; their sum "
    notes += "has the MPI_Init of this start. end: from the last line to the exit, of rank 0."
    table = Results(columns, parts, title, notes)
    table.show()
    write_csv(csv, table.rows(about))
