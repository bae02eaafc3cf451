"""The commands below `hpcsgd bench`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click


@click.group()
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
    from hpcsgd.commands.bench.allreduce.command import main as measure

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
    from hpcsgd.commands.bench.step import main as measure

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
    from hpcsgd.commands.bench.compress.command import SCHEMES
    from hpcsgd.commands.bench.compress.command import main as measure

    kinds = ["gaussian", "resnet18"] if data == "both" else [data]
    given = list(SCHEMES) if schemes is None else _listed(schemes)
    measure(given, None if elements is None else number(elements), kinds, **options)


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
    from hpcsgd.commands.bench.studies.straggler import METHODS
    from hpcsgd.commands.bench.studies.straggler import main as measure

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
    from hpcsgd.commands.bench.studies.scale import METHODS
    from hpcsgd.commands.bench.studies.scale import main as measure

    try:
        counts = [int(count) for count in nodes.split(",")]
    except ValueError:
        raise click.BadParameter("whole numbers with commas between them", param_hint="--nodes") from None
    measure(METHODS if methods is None else _listed(methods), counts, **options)


def _over_links(command: Callable[..., None]) -> Callable[..., None]:
    """The options of studies over several links."""
    options = [
        click.option("--data", type=click.Choice(["digits", "text"]), default="digits", show_default=True),
        click.option(
            "--link", default="fast", show_default=True, help="A label: the launch decides what it is."
        ),
        click.option(
            "--methods", metavar="SPEC;SPEC", help="As for train --strategy. Default: one of each kind."
        ),
        click.option("--seeds", default=3, show_default=True, help="Runs of each."),
        click.option("--target", type=float, help="Test loss. This and all below: default fits the data."),
        click.option(
            "--base-ms", type=float, help="Simulated time of a gradient; of slow ranks four times that."
        ),
        click.option("--model", help="As for train."),
        click.option("--optimizer", help="As for train."),
        click.option("--learning-rate", type=float, help="Of all methods, constant."),
        click.option("--warmup", type=float, help="Epochs in which the learning rate rises."),
        click.option("--clip", type=float, help="Largest norm of a gradient."),
        click.option("--batch", type=int, help="Samples a rank and step."),
        click.option("--epochs", type=float, help="Length of a run."),
        click.option("--evaluate-every", type=float, help="Epochs between evaluations."),
    ]
    return functools.reduce(lambda so_far, option: option(so_far), reversed(options), command)


@bench.command("async")
@_over_links
@click.option("--out", default="async", show_default=True, help="Folder of runs, CSV, PNG and Markdown.")
def asynchronous(methods: str | None, **options: Any) -> None:
    """All-reduce, local SGD, gossip and LASGD: time to a target loss, one rank slow or none, over a link."""
    from hpcsgd.commands.bench.studies.asynchronous import METHODS
    from hpcsgd.commands.bench.studies.asynchronous import main as measure

    measure(methods=METHODS if methods is None else _listed(methods), **options)


@bench.command("ps")
@_over_links
@click.option("--out", default="ps", show_default=True, help="Folder of runs, CSV, PNG and Markdown.")
def servers(methods: str | None, **options: Any) -> None:
    """Parameter servers and all-reduce: time to a target loss, two ranks slow or none, over a link.

    mpiexec -n 9: the last rank is the server; all-reduce has the other eight.
    """
    from hpcsgd.commands.bench.studies.servers import METHODS
    from hpcsgd.commands.bench.studies.servers import main as measure

    measure(methods=METHODS if methods is None else _listed(methods), **options)


@bench.command()
@click.option("--mib", default=64.0, show_default=True, help="Size of the model, float32.")
@click.option("--repeats", default=5, show_default=True, help="Rounds; medians are shown.")
@click.option("--listen", default="bench-push", show_default=True, help="A file that both ranks see.")
@click.option("--link-mbit", type=float, help="Rate of each host's link in Mbit/s, to compare rates to.")
@_CSV
def push(**options: Any) -> None:
    """A model to a parameter server and back: over MPI, and over TCP with the server's log.

    mpiexec -n 2: the second rank is the server.
    """
    from hpcsgd.commands.bench.push import main as measure

    measure(**options)


@bench.command()
@click.option("--model", default="2nn:width=1024", show_default=True, help="As for train.")
@click.option("--batch", default=32, show_default=True, help="Samples per rank.")
@click.option("--repeats", default=40, show_default=True, help="Blocks of steps; medians are shown.")
def trace(**options: Any) -> None:
    """Training steps with a trace, and without: what it costs."""
    from hpcsgd.commands.bench.trace import main as measure

    measure(**options)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def number(text: str, option: str = "--elements") -> int:
    """A whole number, also in thousands or millions: 64k, 11.2M."""
    scale = {"k": 1e3, "M": 1e6}.get(text[-1:], 1)
    try:
        return round(float(text.rstrip("kM")) * scale)
    except (ValueError, OverflowError):
        raise click.BadParameter("a number: 65536, 64k or 11.2M", param_hint=option) from None
