"""The command group `hpcsgd bench`. A command imports its benchmark, and with it torch, only when it runs."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import click

from hpcsgd.commands.bench import options
from hpcsgd.commands.options import Options, command

#: The options of each command, and the module of this folder whose `main` it calls with them.
COMMANDS: dict[str, tuple[type[Options], str]] = {
    "allreduce": (options.AllReduceOptions, "allreduce.command"),
    "async": (options.AsyncOptions, "studies.launches"),
    "compress": (options.CompressOptions, "compress.command"),
    "ps": (options.ServerOptions, "studies.launches"),
    "push": (options.PushOptions, "push"),
    "scale": (options.ScaleOptions, "studies.scale"),
    "startup": (options.StartupOptions, "startup"),
    "step": (options.StepOptions, "step"),
    "straggler": (options.StragglerOptions, "studies.straggler"),
    "trace": (options.TraceOptions, "trace"),
}


@click.group()
def bench() -> None:
    """Benchmark hpcsgd, its alternatives and the hardware limit.

    Start them with mpiexec, like a training: mpiexec -n 4 hpcsgd bench allreduce. Rank 0 prints the tables.
    """


def _run(module: str, given: Options) -> None:
    import_module(f"{__package__}.{module}").main(given)


for _name, (_options, _module) in COMMANDS.items():
    bench.add_command(command(_name, _options, partial(_run, _module)))
