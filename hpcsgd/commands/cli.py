"""The command line: `hpcsgd train`, `serve`, `sbatch`, `tune`, `report`, `trace`, `doctor` and others."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hpcsgd.commands import sbatch, signals
from hpcsgd.commands.bench.commands import bench, number
from hpcsgd.commands.train.settings import Settings, click_options
from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import launcher, shutdown

_PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hpcsgd")
def cli() -> None:
    """Communication-efficient distributed SGD over MPI: mpiexec -n 4 hpcsgd train."""


class _WithRegistries(click.Command):
    """A command whose help lists what the spec options can name."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from hpcsgd import compress, registry, strategies
        from hpcsgd.commands.train.optimizers import OPTIMIZERS
        from hpcsgd.strategies import delays
        from hpcsgd.training import data, models

        given = ("params", "lr", "shape", "classes")
        rare = ("foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
        registries: dict[str, Any] = {
            "Data sets (--data)": data.DATASETS,
            "Models (--model), or module:callable of your own": models.MODELS,
            "Strategies (--strategy)": strategies.STRATEGIES,
            "Compression (--compress), or none": compress.COMPRESSORS,
            "Wrappers of compression (--compress ef+maxnorm:bits=4)": compress.WRAPPERS,
            "Optimizers (--optimizer)": OPTIMIZERS,
            "Simulated delays (--delays)": delays.DELAYS,
        }
        for title, known in registries.items():
            rows = [
                (f"{name}:{options}" if options else name, summary)
                for name, options, summary in registry.describe(known, given + rare)
            ]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=40)


@cli.command(cls=_WithRegistries)
@click_options
@click.option("--trace", is_flag=True, help="Leave a timeline of both threads of every rank: trace.json.")
def train(settings: Settings, trace: bool) -> None:
    """Train a model on all ranks of this job: mpiexec -n 4 hpcsgd train.

    A NAME may have options: --strategy local:period=16. The run's folder holds config.toml (complete: run
    it again with --config), metrics.jsonl and checkpoints. SIGUSR1 and SIGTERM end it with a checkpoint and
    status 0; go on with --resume FOLDER. The file `done` in the folder says that there is no more to do.
    """
    signals.keep()
    from hpcsgd.commands.train.trainer import train as execute

    execute(settings, trace)


_SECONDS = click.FloatRange(0, min_open=True)


@cli.command()
@click.option(
    "--listen", required=True, metavar="FILE", type=_PATH, help="Tells groups where the servers are."
)
@click.option("--mode", default="sync", show_default=True, type=click.Choice(["sync", "async", "elastic"]))
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Of mode elastic: by which share of their distance models draw each other; default: 0.9 / groups.",
)
@click.option("--max-staleness", type=click.IntRange(0), help="How far a group may be ahead; default: any.")
@click.option(
    "--lease", default=10.0, show_default=True, type=_SECONDS, help="Wait so long for who is silent (s)."
)
@click.option("--checkpoint", metavar="FOLDER", type=_PATH, help="What is kept; default: FILE.checkpoint.")
@click.option("--checkpoint-every", default=60.0, show_default=True, type=_SECONDS, help="In seconds.")
@click.option(
    "--groups",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="End when so many have come and are done.",
)
@click.option(
    "--linger",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Wait so long for who left without a goodbye, when all others are done (s).",
)
@click.option("--progress", default="auto", type=click.Choice(["auto", "live", "plain", "off"]))
def serve(**options: Any) -> None:
    """Serve groups of workers that are jobs of their own: mpiexec -n 1 hpcsgd serve --listen FILE.

    Each rank is a server of a part of the model. Groups may come, go, die and return at any time:
    mpiexec -n 4 hpcsgd train --strategy ps:mode=MODE --connect FILE. Ends when all are done. Started again
    after a stop or a crash with the same options, it goes on where it was, and the groups with it.
    """
    signals.keep()
    from hpcsgd.commands.serve.job import serve as execute
    from hpcsgd.commands.serve.service import Options

    execute(Options(**options))


def _job_options(function: Callable[..., None]) -> Callable[..., None]:
    texts = {
        "nodes": "Number of nodes.",
        "ranks_per_node": "Ranks on each.",
        "cpus": "Cores of each rank.",
        "gpus": "GPUs of each node.",
        "time": "Time limit: minutes, hours:minutes:seconds, days-hours, ...",
        "warn": "Seconds before it at which the run writes a checkpoint and ends.",
        "mpi": "What starts the ranks: pmi2 or pmix, of srun, or mpiexec.",
        "requeue": "Back into the queue until the run is done.",
        "name": "Name of the job.",
        "partition": "To be submitted to.",
        "account": "To be charged.",
    }
    for name, text in reversed(texts.items()):
        default = getattr(sbatch.Job, name)
        flag, told = f"--{name.replace('_', '-')}", default not in ("", 0, False)
        option = click.option(flag, default=default, help=text, is_flag=default is False, show_default=told)
        function = option(function)
    return function


@cli.command("sbatch")
@click.argument("kind", type=click.Choice(["train", "sweep"]))
@click.argument("words", nargs=-1)
@_job_options
@click.option("-o", "--out", metavar="FILE", type=_PATH, help="Write it there; default: print it.")
def job_script(kind: str, words: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Write a job script for Slurm: hpcsgd sbatch train --nodes 4 -- --data text > job.sbatch.

    WORDS are arguments of `hpcsgd train`; of a sweep the first is its TOML file, which has a table [[run]]
    for each run. Without WORDS sbatch is given them: sbatch job.sbatch WORDS. So are the scripts in jobs/.
    """
    array = None if kind == "train" else sbatch.elements(words[0]) if words else 0
    text = sbatch.script(sbatch.Job(**options, array=array, words=words))
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise HpcsgdError(f"cannot write {out}", got=error, do="name another file") from error


@cli.group()
def tune() -> None:
    """Find a setting by trying several values at once."""


@tune.command()
@click_options
@click.option("--search-epochs", type=float, help="Length of the search; default: --epochs.")
@click.option("--go-on", is_flag=True, help="Train with the best number afterwards.")
def teleportation(settings: Settings, search_epochs: float | None, go_on: bool) -> None:
    """How many peers should be active: 1, 2, 4, ... at once, on disjoint groups of all peers.

    Takes as long as one training. Other numbers and options: --strategy teleport:active=1x3x9,topology=ring.
    """
    from hpcsgd.commands.tune import tune as execute

    execute(settings, search_epochs, go_on)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", default="report", show_default=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--over", metavar="SETTING", help="Only a table: runs that differ in this alone make one row.")
def report(runs: tuple[Path, ...], out: Path, over: str | None) -> None:
    """Compare RUNS, folders of `hpcsgd train`: a table here, figures and one HTML page in a folder."""
    from rich.console import Console

    from hpcsgd.commands.report import grouped, load, table, write

    console = Console(width=None if sys.stdout.isatty() else 160)
    if over is not None:
        console.print(grouped([load(run) for run in runs], over))
        return
    console.print(table([load(run) for run in runs]))
    for path in write(runs, out):
        click.echo(path)


@cli.command()
@click.argument("folder", type=_PATH)
@click.option("--png", metavar="FILE", type=_PATH, help="Draw it.")
@click.option("--steps", metavar="FIRST:LAST", help="Of the picture; default: all.")
def trace(folder: Path, png: Path | None, steps: str | None) -> None:
    """Find the timeline of `hpcsgd train --trace`, or HPCSGD_TRACE=FOLDER and any script, and draw it.

    Where a rank was killed, trace.json is made now, of what each rank has written until then. Open it in
    https://ui.perfetto.dev or chrome://tracing.
    """
    from hpcsgd.commands.report import figures
    from hpcsgd.commands.report.timeline import timeline
    from hpcsgd.diagnostics import trace_file

    found = re.fullmatch(r"(\d+):(\d+)", steps or "0:0")
    if found is None or (png is not None and png.suffix != ".png"):
        raise click.UsageError("say --png FILE.png, and --steps FIRST:LAST with two numbers")
    file = trace_file.merge(folder)
    click.echo(file)
    if png is not None:
        figure = timeline(file, *(map(int, found.groups()) if steps else ()))
        figure.set_label(png.stem)
        click.echo(figures.png(figure, png.parent))


@cli.command()
@click.argument("name", required=False)
@click.option("-n", "--peers", default=16, show_default=True, type=click.IntRange(1), help="Peers.")
@click.option("--parameters", default="1M", show_default=True, metavar="N", help="Of a model: 11.2M.")
@click.option("--png", metavar="FILE", type=click.Path(path_type=Path), help="Draw it here too.")
def topology(name: str | None, peers: int, parameters: str, png: Path | None) -> None:
    """Show how fast a topology mixes and what it costs; without NAME compare all.

    NAME may have options, with "+" between them: random-regular:degree=4+seed=1. Models are float32.
    """
    from rich.console import Console

    from hpcsgd.commands.topology import tables
    from hpcsgd.topology import build

    if png is not None and (name is None or png.suffix != ".png"):
        raise click.UsageError("--png draws one topology: give its NAME and a FILE that ends in .png")
    count = number(parameters, "--parameters")
    if count < 1:
        raise click.BadParameter("at least 1", param_hint="--parameters")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if name is None:
        console.print(tables.comparison(peers, count))
        return
    built = build(name, peers)
    console.print(tables.details(built, name, count))
    if png is not None:
        from hpcsgd.commands.report import figures
        from hpcsgd.commands.topology.drawing import draw

        with figures.style():
            figure = draw(built, f"{name}, {peers} peers")
        figure.set_label(png.stem)
        try:
            click.echo(figures.png(figure, png.parent))
        except OSError as error:
            raise HpcsgdError(f"cannot write {png}", got=error, do="name another file") from error


@cli.command()
@click.option("--out", default="runs", show_default=True, metavar="FOLDER", type=_PATH, help="Of the runs.")
def doctor(out: Path) -> int:
    """Look for what is wrong, under the launcher that trains: mpiexec -n 4 hpcsgd doctor.

    One page: versions, MPI, launcher, cores, shared memory, links, clocks, GPUs, kernels, file system; then
    the mistakes with their fixes. Takes seconds. Exit status 1 with an error among them.
    """
    from hpcsgd.commands.doctor import main as examine

    return examine(out)


cli.add_command(bench)


def main() -> None:
    """Entry point; an error is one message on one rank, not a traceback on all."""
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        _leave(error.exit_code, error.show)
    except click.Abort:
        if _mpi_is_up() and launcher.size()[1] > 1:
            raise KeyboardInterrupt from None  # perhaps of this rank alone: it must end the others too
        _leave(130, lambda: click.echo("interrupted", err=True))
    except HpcsgdError as error:
        text = str(error)
        if _mpi_is_up() and not error.everywhere:
            raise  # the others may be inside a collective: what ends this rank must end them too
        _leave(2, lambda: click.echo(f"hpcsgd: {text}", err=True))
    else:
        shutdown.leave(code if isinstance(code, int) else 0)


def _leave(code: int, show: Callable[[], None]) -> None:
    """Exit; all ranks of a job are here for the same reason, and one of them is enough to say it."""
    if shutdown.speaks():
        show()
    shutdown.leave(code)


def _mpi_is_up() -> bool:
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and module.Is_initialized() and not module.Is_finalized()
