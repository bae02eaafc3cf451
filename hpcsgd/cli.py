"""The command line: `hpcsgd train`, `tune`, `report`, `topology` and `bench`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hpcsgd import launcher
from hpcsgd.errors import HpcsgdError
from hpcsgd.settings import Settings, click_options


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hpcsgd")
def cli() -> None:
    """Communication-efficient distributed SGD over MPI: mpiexec -n 4 hpcsgd train."""


class _WithRegistries(click.Command):
    """A command whose help lists what the spec options can name."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from hpcsgd import compress, data, delays, models, specs, strategies
        from hpcsgd.optim import OPTIMIZERS

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
        for title, registry in registries.items():
            rows = [
                (f"{name}:{options}" if options else name, summary)
                for name, options, summary in specs.describe(registry, given + rare)
            ]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=40)


@cli.command(cls=_WithRegistries)
@click_options
def train(settings: Settings) -> None:
    """Train a model on all ranks of this job: mpiexec -n 4 hpcsgd train.

    A NAME may have options: --strategy local:period=16. The run's folder holds config.toml (complete: run
    it again with --config), metrics.jsonl and checkpoints; go on after a stop with --resume FOLDER.
    """
    from hpcsgd.train import train as execute

    execute(settings)


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
    from hpcsgd.tune import tune as execute

    execute(settings, search_epochs, go_on)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", default="report", show_default=True, type=click.Path(path_type=Path), help="Folder.")
@click.option("--over", metavar="SETTING", help="Only a table: runs that differ in this alone make one row.")
def report(runs: tuple[Path, ...], out: Path, over: str | None) -> None:
    """Compare RUNS, folders of `hpcsgd train`: a table here, figures and one HTML page in a folder."""
    from rich.console import Console

    from hpcsgd.report import grouped, load, table, write

    console = Console(width=None if sys.stdout.isatty() else 160)
    if over is not None:
        console.print(grouped([load(run) for run in runs], over))
        return
    console.print(table([load(run) for run in runs]))
    for path in write(runs, out):
        click.echo(path)


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

    from hpcsgd.topology import build, show

    if png is not None and (name is None or png.suffix != ".png"):
        raise click.UsageError("--png draws one topology: give its NAME and a FILE that ends in .png")
    count = _number(parameters, "--parameters")
    if count < 1:
        raise click.BadParameter("at least 1", param_hint="--parameters")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if name is None:
        console.print(show.comparison(peers, count))
        return
    built = build(name, peers)
    console.print(show.details(built, name, count))
    if png is not None:
        from hpcsgd.report import render
        from hpcsgd.topology.draw import draw

        with render.style():
            figure = draw(built, f"{name}, {peers} peers")
        figure.set_label(png.stem)
        try:
            click.echo(render.png(figure, png.parent))
        except OSError as error:
            raise HpcsgdError(f"cannot write {png}", got=error, do="name another file") from error


@cli.group()
def bench() -> None:
    """Measure hpcsgd beside the alternatives and the limit, in one run."""


_CSV = click.option("--csv", metavar="FILE", help="Write the figures here too.")


@bench.command()
@click.option("--sizes", default="4,256,4096,65536", show_default=True, help="KiB of float32, with commas.")
@click.option("--repeats", default=10, show_default=True, help="Rounds; medians are shown.")
@click.option("--algorithm", default="auto", show_default=True, help="As for train.")
@click.option("--link-mbit", type=float, help="Rate of each host's link in Mbit/s, for the limit.")
@_CSV
def allreduce(sizes: str, repeats: int, algorithm: str, link_mbit: float | None, csv: str | None) -> None:
    """The mean of float32 buffers: hpcsgd, MPI, gloo, and memory copy or link."""
    from hpcsgd.bench.allreduce import main as measure

    try:
        kib = [float(size) for size in sizes.split(",")]
    except ValueError:
        raise click.BadParameter("numbers of KiB with commas between them", param_hint="--sizes") from None
    measure([int(1024 * size) for size in kib], repeats, csv, algorithm, link_mbit)


@bench.command()
@click.option("--models", default="resnet18,gpt", show_default=True, help="Models, with commas.")
@click.option("--batch", default=16, show_default=True, help="Samples per rank.")
@click.option("--repeats", default=10, show_default=True, help="Blocks of steps; medians are shown.")
@_CSV
def step(models: str, batch: int, repeats: int, csv: str | None) -> None:
    """Training steps: hpcsgd, DDP over gloo, and no communication at all."""
    from hpcsgd.bench.step import main as measure

    measure(models=models.split(","), batch=batch, repeats=repeats, csv=csv)


@bench.command()
@click.option("--schemes", metavar="SPEC;SPEC", help="As for train --compress. Default: one of each kind.")
@click.option("--elements", metavar="N", help="Numbers: 11.2M. Default: those of ResNet-18; kernels 16 Mi.")
@click.option(
    "--data",
    type=click.Choice(["gaussian", "resnet18", "both"]),
    default="both",
    show_default=True,
    help="Gradients: normal numbers, or those of a ResNet-18.",
)
@click.option("--repeats", default=5, show_default=True, help="Rounds; medians are shown.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: the kernels alone, on the GPU.",
)
@click.option("--bucket-mib", default=4.0, show_default=True, help="Size of a bucket.")
@click.option("--algorithm", default="auto", show_default=True, help="As for train.")
@_CSV
def compress(schemes: str | None, elements: str | None, data: str, **options: Any) -> None:
    """Compression: time, bytes and error of each scheme, beside float32, gloo and torch's hooks."""
    from hpcsgd.bench.compress import SCHEMES
    from hpcsgd.bench.compress import main as measure

    kinds = ["gaussian", "resnet18"] if data == "both" else [data]
    given = list(SCHEMES) if schemes is None else _listed(schemes)
    measure(given, None if elements is None else _number(elements), kinds, **options)


@bench.command()
@click.option("--methods", metavar="SPEC;SPEC", help="As for train --strategy. Default: one of each kind.")
@click.option("--delays", metavar="SPEC;SPEC", default="", help="As for train --delays. Default: four kinds.")
@click.option("--topology", default="ring", show_default=True, help="Of methods that do not name theirs.")
@click.option("--base-ms", default=20.0, show_default=True, help="Default delays: of a gradient.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each; medians are shown.")
@click.option("--target", default=0.9, show_default=True, help="Test accuracy, from 0 to 1.")
@click.option("--epochs", default=5.0, show_default=True, help="Length of a run.")
@click.option("--evaluate-every", default=1.0, show_default=True, help="Epochs between evaluations.")
@click.option("--optimizer", default="adam", show_default=True, help="As for train.")
@click.option("--learning-rate", default=0.005, show_default=True, help="Of all methods, constant.")
@click.option("--data", default="digits", show_default=True, help="As for train.")
@click.option("--alpha", type=float, help="As for train. Default: IID.")
@click.option("--out", default="straggler", show_default=True, help="Folder of runs, CSV and PNG.")
def straggler(methods: str | None, delays: str, **options: Any) -> None:
    """Simulated stragglers: time per iteration and time to a target accuracy of each method."""
    from hpcsgd.bench.straggler import METHODS
    from hpcsgd.bench.straggler import main as measure

    measure(METHODS if methods is None else _listed(methods), _listed(delays), **options)


@bench.command()
@click.option("--methods", metavar="SPEC;SPEC", help="As for train --strategy. Default: D-SGD and teleport.")
@click.option("--nodes", default="8,16,32,64", show_default=True, help="Virtual nodes, with commas.")
@click.option(
    "--active", default="4", show_default=True, help="Of teleport: a number, or 8=2,16=4 for each of --nodes."
)
@click.option("--seeds", default=3, show_default=True, help="Runs of each; mean and deviation are shown.")
@click.option("--steps", default=150, show_default=True, help="Iterations of every run.")
@click.option("--batch", default=8, show_default=True, help="Samples a node and iteration.")
@click.option("--alpha", default=0.1, show_default=True, help="Dirichlet label skew between nodes.")
@click.option("--learning-rate", default="dsgd=0.3,teleport=0.1", show_default=True, help="Or one for all.")
@click.option("--optimizer", default="sgd:momentum=0.9", show_default=True, help="As for train.")
@click.option("--model", default="2nn:width=64", show_default=True, help="As for train.")
@click.option("--data", default="digits", show_default=True, help="As for train.")
@click.option("--out", default="scale", show_default=True, help="Folder of runs, CSV and PNG.")
def scale(methods: str | None, nodes: str, **options: Any) -> None:
    """Accuracy of gossip methods against the number of nodes, virtual ones, on skewed data."""
    from hpcsgd.bench.scale import METHODS
    from hpcsgd.bench.scale import main as measure

    try:
        counts = [int(count) for count in nodes.split(",")]
    except ValueError:
        raise click.BadParameter("whole numbers with commas between them", param_hint="--nodes") from None
    measure(METHODS if methods is None else _listed(methods), counts, **options)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _number(text: str, option: str = "--elements") -> int:
    """A whole number, also in thousands or millions: 64k, 11.2M."""
    scale = {"k": 1e3, "M": 1e6}.get(text[-1:], 1)
    try:
        return round(float(text.rstrip("kM")) * scale)
    except (ValueError, OverflowError):
        raise click.BadParameter("a number: 65536, 64k or 11.2M", param_hint=option) from None


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
        sys.exit(code if isinstance(code, int) else 0)


def _leave(code: int, show: Callable[[], None]) -> None:
    """Exit; all ranks of a job are here for the same reason, and one of them is enough to say it."""
    if launcher.rank() == 0:
        show()
    sys.exit(code)


def _mpi_is_up() -> bool:
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and module.Is_initialized() and not module.Is_finalized()
