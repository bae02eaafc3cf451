"""The command group `hpcsgd bench`. A command imports its benchmark, and with it torch, only when it runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import click


@click.group()
def bench() -> None:
    """Benchmark hpcsgd, its alternatives and the hardware limit.

    Start them with mpiexec, like a training: mpiexec -n 4 hpcsgd bench allreduce. Rank 0 prints the tables.
    """


_CSV = click.option("--csv", metavar="FILE", help="Also write the results to this CSV file.")


def _device(meaning: str) -> Callable[..., Any]:
    choice = click.Choice(["cpu", "cuda"])
    return click.option("--device", type=choice, default="cpu", show_default=True, help=meaning)


@bench.command()
@click.option(
    "--sizes",
    default="4,256,4096,65536",
    show_default=True,
    metavar="KIB,KIB",
    help="Buffer sizes in KiB of float32, comma-separated.",
)
@click.option("--repeats", default=10, show_default=True, help="Repetitions; the table shows medians.")
@click.option("--algorithm", default="auto", show_default=True, help="As --algorithm of hpcsgd train.")
@click.option(
    "--link-mbit", type=float, help="Link rate of each host in Mbit/s; sets the limit between hosts."
)
@_device("cuda measures buffers in device memory.")
@_CSV
def allreduce(sizes: str, **options: Any) -> None:
    """All-reduce (mean) by hpcsgd, MPI and gloo, and the limit.

    The limit is a memory copy on one node, and --link-mbit between nodes.
    """
    from hpcsgd.commands.bench.allreduce.command import main as measure

    try:
        kib = [float(size) for size in sizes.split(",")]
    except ValueError:
        raise click.BadParameter(
            "expected comma-separated numbers of KiB, such as 4,256", param_hint="--sizes"
        ) from None
    measure([int(1024 * size) for size in kib], **options)


@bench.command()
@click.option(
    "--models",
    default="resnet18,gpt",
    show_default=True,
    metavar="MODEL,MODEL",
    help="Models, comma-separated, as --model of hpcsgd train.",
)
@click.option("--batch", default=16, show_default=True, help="Samples per rank and step.")
@click.option("--repeats", default=10, show_default=True, help="Blocks of steps; the table shows medians.")
@_device("cuda trains on the GPU, with batches that are already there.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type of parameters, gradients and optimizer state.",
)
@click.option("--context", default=64, show_default=True, help="Tokens per sample of gpt.")
@click.option(
    "--compress", metavar="SPEC", help="Also train with this scheme, as --compress of hpcsgd train."
)
@click.option("--bucket-mib", default=4.0, show_default=True, help="Size of hpcsgd's buckets in MiB.")
@_CSV
def step(models: str, **options: Any) -> None:
    """Training step: hpcsgd, DDP over gloo, and no communication."""
    from hpcsgd.commands.bench.step import main as measure

    measure(models=_split_models(models), **options)


@bench.command()
@click.option(
    "--schemes",
    metavar="SPEC;SPEC",
    help="Compression schemes separated by ';', each as --compress of hpcsgd train. Default: one of each "
    "kind.",
)
@click.option(
    "--elements",
    metavar="N",
    help="Gradient elements, for example 64k or 11.2M. Default: those of ResNet-18 (11.2M), and for the "
    "kernels 16.8M, on a GPU 134M.",
)
@click.option(
    "--data",
    type=click.Choice(["gaussian", "resnet18", "both"]),
    default="both",
    show_default=True,
    help="Gradients to compress: standard normal samples, or recorded from training a ResNet-18.",
)
@click.option("--repeats", default=5, show_default=True, help="Repetitions; the tables show medians.")
@_device("cuda measures the kernels only, on the GPU.")
@click.option("--bucket-mib", default=4.0, show_default=True, help="Bucket size in MiB.")
@click.option("--algorithm", default="auto", show_default=True, help="As --algorithm of hpcsgd train.")
@_CSV
def compress(schemes: str | None, elements: str | None, data: str, **options: Any) -> None:
    """Compression schemes: time, bytes and error.

    They are measured beside float32, gloo and the hooks of DDP.
    """
    from hpcsgd.commands.bench.compress.command import SCHEMES
    from hpcsgd.commands.bench.compress.command import main as measure

    kinds = ["gaussian", "resnet18"] if data == "both" else [data]
    selected = list(SCHEMES) if schemes is None else _split_specs(schemes)
    measure(selected, None if elements is None else parse_count(elements), kinds, **options)


@bench.command()
@click.option(
    "--methods",
    metavar="SPEC;SPEC",
    help="Strategies separated by ';', each as --strategy of hpcsgd train. Default: one of each kind.",
)
@click.option(
    "--delays",
    metavar="SPEC;SPEC",
    default="",
    help="Simulated delays separated by ';', each as --delays of hpcsgd train. Default: constant, one slow "
    "rank, exponential, Pareto.",
)
@click.option(
    "--topology", default="ring", show_default=True, help="Topology of the methods that do not name one."
)
@click.option(
    "--base-ms", default=20.0, show_default=True, help="Simulated gradient time of the default delays, in ms."
)
@click.option("--seeds", default=3, show_default=True, help="Runs per method and delay; medians are shown.")
@click.option("--target", default=0.9, show_default=True, help="Target test accuracy, from 0 to 1.")
@click.option("--epochs", default=5.0, show_default=True, help="Epochs per run.")
@click.option("--evaluate-every", default=1.0, show_default=True, help="Epochs between evaluations.")
@click.option("--optimizer", default="adam", show_default=True, help="As --optimizer of hpcsgd train.")
@click.option(
    "--learning-rate", default=0.005, show_default=True, help="Constant learning rate of all methods."
)
@click.option("--data", default="digits", show_default=True, help="As --data of hpcsgd train.")
@click.option("--alpha", type=float, help="As --alpha of hpcsgd train. Default: IID shards.")
@click.option(
    "--out", default="straggler", show_default=True, help="Folder of the runs, the CSV file and the plot."
)
def straggler(methods: str | None, delays: str, **options: Any) -> None:
    """Simulated stragglers: time per iteration and to an accuracy.

    The accuracy is --target. A study that was interrupted continues with the same command.
    """
    from hpcsgd.commands.bench.studies.straggler import METHODS
    from hpcsgd.commands.bench.studies.straggler import main as measure

    measure(METHODS if methods is None else _split_specs(methods), _split_specs(delays), **options)


@bench.command()
@click.option(
    "--methods",
    metavar="SPEC;SPEC",
    help="Strategies separated by ';', each as --strategy of hpcsgd train. Default: D-SGD on four "
    "topologies, and teleport.",
)
@click.option(
    "--nodes",
    default="8,16,32,64",
    show_default=True,
    metavar="N,N",
    help="Numbers of virtual nodes, comma-separated.",
)
@click.option(
    "--active",
    default="4",
    show_default=True,
    help="Active nodes of teleport: one number, or NODES=ACTIVE for each of --nodes (8=2,16=4).",
)
@click.option(
    "--seeds", default=3, show_default=True, help="Runs per method; mean and standard deviation are shown."
)
@click.option("--steps", default=150, show_default=True, help="Iterations per run.")
@click.option("--batch", default=8, show_default=True, help="Samples per node and iteration.")
@click.option(
    "--alpha", default=0.1, show_default=True, help="Dirichlet parameter of the label skew between nodes."
)
@click.option(
    "--learning-rate",
    default="dsgd=0.3,teleport=0.1",
    show_default=True,
    help="NAME=RATE for each method, comma-separated, or one number for all.",
)
@click.option(
    "--optimizer", default="sgd:momentum=0.9", show_default=True, help="As --optimizer of hpcsgd train."
)
@click.option("--model", default="2nn:width=64", show_default=True, help="As --model of hpcsgd train.")
@click.option("--data", default="digits", show_default=True, help="As --data of hpcsgd train.")
@click.option(
    "--out", default="scale", show_default=True, help="Folder of the runs, the CSV file and the plot."
)
def scale(methods: str | None, nodes: str, **options: Any) -> None:
    """Accuracy of gossip methods by the number of virtual nodes.

    The data are skewed (--alpha). A study that was interrupted continues with the same command.
    """
    from hpcsgd.commands.bench.studies.scale import METHODS
    from hpcsgd.commands.bench.studies.scale import main as measure

    try:
        counts = [int(count) for count in nodes.split(",")]
    except ValueError:
        raise click.BadParameter(
            "expected comma-separated integers, such as 8,16", param_hint="--nodes"
        ) from None
    measure(METHODS if methods is None else _split_specs(methods), counts, **options)


def _study_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the studies with a launch per link."""
    fits = "Default: fits --data."
    options = [
        click.option(
            "--data",
            type=click.Choice(["digits", "text"]),
            default="digits",
            show_default=True,
            help="Data set; the model and the options below have defaults for each.",
        ),
        click.option(
            "--link",
            default="fast",
            show_default=True,
            help="Label of this launch's network, for run names, tables and goals; it does not change the "
            "network. Launches with other labels add to the same --out.",
        ),
        click.option(
            "--methods",
            metavar="SPEC;SPEC",
            help="Strategies separated by ';', each as --strategy of hpcsgd train. Default: one of each "
            "kind.",
        ),
        click.option("--seeds", default=3, show_default=True, help="Runs per method and condition."),
        click.option("--target", type=float, help=f"Target test loss. {fits}"),
        click.option(
            "--base-ms",
            type=float,
            help=f"Simulated gradient time in ms; four times as long on slow ranks. {fits}",
        ),
        click.option("--model", help=f"As --model of hpcsgd train. {fits}"),
        click.option("--optimizer", help=f"As --optimizer of hpcsgd train. {fits}"),
        click.option(
            "--learning-rate",
            type=float,
            help=f"Learning rate of all methods, constant after --warmup. {fits}",
        ),
        click.option("--warmup", type=float, help=f"Epochs of linear learning rate warm-up. {fits}"),
        click.option("--clip", type=float, help=f"Largest gradient norm. {fits}"),
        click.option("--batch", type=int, help=f"Samples per rank and step. {fits}"),
        click.option("--epochs", type=float, help=f"Epochs per run. {fits}"),
        click.option("--evaluate-every", type=float, help=f"Epochs between evaluations. {fits}"),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


@bench.command("async")
@_study_options
@click.option(
    "--out", default="async", show_default=True, help="Folder of the runs, CSV and Markdown tables and plot."
)
def asynchronous(methods: str | None, **options: Any) -> None:
    """Synchronous and asynchronous SGD: time to a target test loss.

    The methods are all-reduce, local SGD, gossip and LASGD. Each runs with equal ranks and with one
    simulated slow rank. A study that was interrupted continues with the same command.
    """
    from hpcsgd.commands.bench.studies.asynchronous import METHODS
    from hpcsgd.commands.bench.studies.asynchronous import main as measure

    measure(methods=METHODS if methods is None else _split_specs(methods), **options)


@bench.command("ps")
@_study_options
@click.option(
    "--out", default="ps", show_default=True, help="Folder of the runs, CSV and Markdown tables and plot."
)
def servers(methods: str | None, **options: Any) -> None:
    """Parameter servers and all-reduce: time to a target test loss.

    Each method runs with equal ranks and with two simulated slow ranks. Start it with mpiexec -n 9: the last
    rank is the server, and all-reduce uses the other eight. A study that was interrupted continues with the
    same command.
    """
    from hpcsgd.commands.bench.studies.servers import METHODS
    from hpcsgd.commands.bench.studies.servers import main as measure

    measure(methods=METHODS if methods is None else _split_specs(methods), **options)


@bench.command()
@click.option("--mib", default=64.0, show_default=True, help="Model size in MiB of float32.")
@click.option("--repeats", default=5, show_default=True, help="Repetitions; the table shows medians.")
@click.option(
    "--listen",
    default="bench-push",
    show_default=True,
    help="Rendezvous file in a folder that both ranks share.",
)
@click.option("--link-mbit", type=float, help="Link rate of each host in Mbit/s, to compare the rates to.")
@_CSV
def push(**options: Any) -> None:
    """Push and pull of a model over MPI, and over TCP.

    Over TCP the server writes its update log. Start it with mpiexec -n 2: the second rank is the parameter
    server.
    """
    from hpcsgd.commands.bench.push import main as measure

    measure(**options)


@bench.command()
@click.option("--model", default="2nn:width=1024", show_default=True, help="As --model of hpcsgd train.")
@click.option("--batch", default=32, show_default=True, help="Samples per rank and step.")
@click.option("--repeats", default=40, show_default=True, help="Blocks of steps; the table shows medians.")
def trace(**options: Any) -> None:
    """Overhead of --trace: training steps with and without it."""
    from hpcsgd.commands.bench.trace import main as measure

    measure(**options)


def _split_specs(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _split_models(text: str) -> list[str]:
    """Split specs at the commas that no option follows: a model's name has no "="."""
    return re.split(r",(?![^,:]*=)", text)


def parse_count(text: str, option: str = "--elements") -> int:
    """Parse a count that may end in k (thousands) or M (millions), such as 64k or 11.2M."""
    scale = {"k": 1e3, "M": 1e6}.get(text[-1:], 1)
    try:
        return round(float(text.rstrip("kM")) * scale)
    except (ValueError, OverflowError):
        raise click.BadParameter("expected a number such as 65536, 64k or 11.2M", param_hint=option) from None
