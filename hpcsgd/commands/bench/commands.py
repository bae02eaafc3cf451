"""The command group `hpcsgd bench`. A command imports its benchmark, and with it torch, only when it runs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import click

from hpcsgd.commands.options import (
    CompressSpec,
    DataSpec,
    DelaysSpec,
    ModelSpec,
    OptimizerSpec,
    ShortCount,
    StrategySpec,
    TopologySpec,
    ValueByName,
    Values,
    option,
)
from hpcsgd.registry import Accepted, Within
from hpcsgd.registry.limits import BucketMib, Count, PeerCount, Size, Skew
from hpcsgd.training import choices

Repeats = Annotated[int, Within(1, 10**6)]
Seeds = Annotated[int, Within(1, 10**4)]
Epochs = Annotated[float, Within(0, 1e9)]
Rate = Annotated[float, Within(0, 1e9)]
Positive = Annotated[float, Within(1e-3, 1e9)]
Elements = Annotated[int, Within(1, 10**12)]


def _check_link(text: str) -> None:
    if not re.fullmatch(r"[\w.]{1,64}", text):
        raise ValueError(text)


#: A label that may be part of a run's name.
Link = Annotated[str, Accepted(_check_link, "100mbit, of letters, digits, dots and underscores")]


class _Models(Values):
    def split(self, text: str) -> list[str]:
        # At the commas that no option follows: a model's name has no "=".
        return re.split(r",(?![^,:]*=)", text)


@click.group()
def bench() -> None:
    """Benchmark hpcsgd, its alternatives and the hardware limit.

    Start them with mpiexec, like a training: mpiexec -n 4 hpcsgd bench allreduce. Rank 0 prints the tables.
    """


_csv = option("--csv", Path, "Also write the results to this CSV file.", metavar="FILE")
_algorithm = option("--algorithm", choices.Algorithm, "As --algorithm of hpcsgd train.", "auto")


def _device(meaning: str) -> Callable[..., Any]:
    return option("--device", Literal["cpu", "cuda"], meaning, "cpu")


def _methods(default: str) -> Callable[..., Any]:
    meaning = f"Strategies separated by ';', each as --strategy of hpcsgd train. Default: {default}."
    return option("--methods", Values(StrategySpec, ";"), meaning, metavar="SPEC;SPEC")


@bench.command()
@option(
    "--sizes",
    Values(Annotated[float, Within(1 / 256, 1e9)]),
    "Buffer sizes in KiB of float32, comma-separated.",
    "4,256,4096,65536",
    metavar="KIB,KIB",
)
@option("--repeats", Repeats, "Repetitions; the table shows medians.", 10)
@_algorithm
@option("--link-mbit", Positive, "Link rate of each host in Mbit/s; sets the limit between hosts.")
@_device("cuda measures buffers in device memory.")
@_csv
def allreduce(sizes: list[float], **options: Any) -> None:
    """All-reduce (mean) by hpcsgd, MPI and gloo, and the limit.

    The limit is a memory copy on one node, and --link-mbit between nodes.
    """
    from hpcsgd.commands.bench.allreduce.command import main as measure

    measure([int(1024 * size) for size in sizes], **options)


@bench.command()
@option(
    "--models",
    _Models(ModelSpec),
    "Models, comma-separated, as --model of hpcsgd train.",
    "resnet18,gpt",
    metavar="MODEL,MODEL",
)
@option("--batch", Count, "Samples per rank and step.", 16)
@option("--repeats", Repeats, "Blocks of steps; the table shows medians.", 10)
@_device("cuda trains on the GPU, with batches that are already there.")
@option(
    "--dtype", Literal["float32", "bfloat16"], "Type of parameters, gradients and optimizer state.", "float32"
)
@option("--context", Size, "Tokens per sample of gpt.", 64)
@option(
    "--compress",
    CompressSpec,
    "Also train with this scheme, as --compress of hpcsgd train.",
    metavar="SPEC",
)
@option("--bucket-mib", BucketMib, "Size of hpcsgd's buckets in MiB.", 4.0)
@_csv
def step(**options: Any) -> None:
    """Training step: hpcsgd, DDP over gloo, and no communication."""
    from hpcsgd.commands.bench.step import main as measure

    measure(**options)


@bench.command()
@option(
    "--schemes",
    Values(CompressSpec, ";"),
    "Compression schemes separated by ';', each as --compress of hpcsgd train. Default: one of each kind.",
    metavar="SPEC;SPEC",
)
@option(
    "--elements",
    ShortCount(Elements),
    "Gradient elements, for example 64k or 11.2M. Default: those of ResNet-18 (11.2M), and for the "
    "kernels 16.8M, on a GPU 134M.",
    metavar="N",
)
@option(
    "--data",
    Literal["gaussian", "resnet18", "both"],
    "Gradients to compress: standard normal samples, or recorded from training a ResNet-18.",
    "both",
)
@option("--repeats", Repeats, "Repetitions; the tables show medians.", 5)
@_device("cuda measures the kernels only, on the GPU.")
@option("--bucket-mib", BucketMib, "Bucket size in MiB.", 4.0)
@_algorithm
@_csv
def compress(schemes: list[str] | None, data: str, **options: Any) -> None:
    """Compression schemes: time, bytes and error.

    They are measured beside float32, gloo and the hooks of DDP.
    """
    from hpcsgd.commands.bench.compress.command import SCHEMES
    from hpcsgd.commands.bench.compress.command import main as measure

    kinds = ["gaussian", "resnet18"] if data == "both" else [data]
    measure(schemes or SCHEMES, data=kinds, **options)


@bench.command()
@_methods("one of each kind")
@option(
    "--delays",
    Values(DelaysSpec, ";"),
    "Simulated delays separated by ';', each as --delays of hpcsgd train. Default: constant, one slow "
    "rank, exponential, Pareto.",
    metavar="SPEC;SPEC",
)
@option("--topology", TopologySpec, "Topology of the methods that do not name one.", "ring")
@option("--base-ms", Positive, "Simulated gradient time of the default delays, in ms.", 20.0)
@option("--seeds", Seeds, "Runs per method and delay; medians are shown.", 3)
@option("--target", Annotated[float, Within(1e-6, 1)], "Target test accuracy, from 0 to 1.", 0.9)
@option("--epochs", Epochs, "Epochs per run.", 5.0)
@option("--evaluate-every", Epochs, "Epochs between evaluations.", 1.0)
@option("--optimizer", OptimizerSpec, "As --optimizer of hpcsgd train.", "adam")
@option("--learning-rate", Rate, "Constant learning rate of all methods.", 0.005)
@option("--data", DataSpec, "As --data of hpcsgd train.", "digits")
@option("--alpha", Skew, "As --alpha of hpcsgd train. Default: IID shards.")
@option("--out", Path, "Folder of the runs, the CSV file and the plot.", "straggler")
def straggler(methods: list[str] | None, delays: list[str] | None, **options: Any) -> None:
    """Simulated stragglers: time per iteration and to an accuracy.

    The accuracy is --target. A study that was interrupted continues with the same command.
    """
    from hpcsgd.commands.bench.studies.straggler import METHODS
    from hpcsgd.commands.bench.studies.straggler import main as measure

    measure(methods or METHODS, delays or (), **options)


@bench.command()
@_methods("D-SGD on four topologies, and teleport")
@option(
    "--nodes",
    Values(PeerCount),
    "Numbers of virtual nodes, comma-separated.",
    "8,16,32,64",
    metavar="N,N",
)
@option(
    "--active",
    ValueByName(PeerCount),
    "Active nodes of teleport: one number, or NODES=ACTIVE for each of --nodes (8=2,16=4).",
    "4",
    metavar="TEXT",
)
@option("--seeds", Seeds, "Runs per method; mean and standard deviation are shown.", 3)
@option("--steps", Count, "Iterations per run.", 150)
@option("--batch", Count, "Samples per node and iteration.", 8)
@option("--alpha", Skew, "Dirichlet parameter of the label skew between nodes.", 0.1)
@option(
    "--learning-rate",
    ValueByName(Rate),
    "NAME=RATE for each method, comma-separated, or one number for all.",
    "dsgd=0.3,teleport=0.1",
    metavar="TEXT",
)
@option("--optimizer", OptimizerSpec, "As --optimizer of hpcsgd train.", "sgd:momentum=0.9")
@option("--model", ModelSpec, "As --model of hpcsgd train.", "2nn:width=64")
@option("--data", DataSpec, "As --data of hpcsgd train.", "digits")
@option("--out", Path, "Folder of the runs, the CSV file and the plot.", "scale")
def scale(methods: list[str] | None, **options: Any) -> None:
    """Accuracy of gossip methods by the number of virtual nodes.

    The data are skewed (--alpha). A study that was interrupted continues with the same command.
    """
    from hpcsgd.commands.bench.studies.scale import METHODS
    from hpcsgd.commands.bench.studies.scale import main as measure

    measure(methods or METHODS, **options)


def _study_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the studies with a launch per link."""
    fits = "Default: fits --data."
    options = [
        option(
            "--data",
            Literal["digits", "text"],
            "Data set; the model and the options below have defaults for each.",
            "digits",
        ),
        option(
            "--link",
            Link,
            "Label of this launch's network, for run names, tables and goals; it does not change the "
            "network. Launches with other labels add to the same --out.",
            "fast",
        ),
        _methods("one of each kind"),
        option("--seeds", Seeds, "Runs per method and condition.", 3),
        option("--target", Positive, f"Target test loss. {fits}"),
        option(
            "--base-ms",
            Positive,
            f"Simulated gradient time in ms; four times as long on slow ranks. {fits}",
        ),
        option("--model", ModelSpec, f"As --model of hpcsgd train. {fits}"),
        option("--optimizer", OptimizerSpec, f"As --optimizer of hpcsgd train. {fits}"),
        option("--learning-rate", Rate, f"Learning rate of all methods, constant after --warmup. {fits}"),
        option("--warmup", Epochs, f"Epochs of linear learning rate warm-up. {fits}"),
        option("--clip", Positive, f"Largest gradient norm. {fits}"),
        option("--batch", Count, f"Samples per rank and step. {fits}"),
        option("--epochs", Epochs, f"Epochs per run. {fits}"),
        option("--evaluate-every", Epochs, f"Epochs between evaluations. {fits}"),
    ]
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


@bench.command("async")
@_study_options
@option("--out", Path, "Folder of the runs, CSV and Markdown tables and plot.", "async")
def asynchronous(methods: list[str] | None, **options: Any) -> None:
    """Synchronous and asynchronous SGD: time to a target test loss.

    The methods are all-reduce, local SGD, gossip and LASGD. Each runs with equal ranks and with one
    simulated slow rank. A study that was interrupted continues with the same command.
    """
    from hpcsgd.commands.bench.studies.asynchronous import METHODS
    from hpcsgd.commands.bench.studies.asynchronous import main as measure

    measure(methods=methods or METHODS, **options)


@bench.command("ps")
@_study_options
@option("--out", Path, "Folder of the runs, CSV and Markdown tables and plot.", "ps")
def servers(methods: list[str] | None, **options: Any) -> None:
    """Parameter servers and all-reduce: time to a target test loss.

    Each method runs with equal ranks and with two simulated slow ranks. Start it with mpiexec -n 9: the last
    rank is the server, and all-reduce uses the other eight. A study that was interrupted continues with the
    same command.
    """
    from hpcsgd.commands.bench.studies.servers import METHODS
    from hpcsgd.commands.bench.studies.servers import main as measure

    measure(methods=methods or METHODS, **options)


@bench.command()
@option("--mib", Annotated[float, Within(1e-3, 1e6)], "Model size in MiB of float32.", 64.0)
@option("--repeats", Repeats, "Repetitions; the table shows medians.", 5)
@option("--listen", Path, "Rendezvous file in a folder that both ranks share.", "bench-push")
@option("--link-mbit", Positive, "Link rate of each host in Mbit/s, to compare the rates to.")
@_csv
def push(**options: Any) -> None:
    """Push and pull of a model over MPI, and over TCP.

    Over TCP the server writes its update log. Start it with mpiexec -n 2: the second rank is the parameter
    server.
    """
    from hpcsgd.commands.bench.push import main as measure

    measure(**options)


@bench.command()
@option("--model", ModelSpec, "As --model of hpcsgd train.", "2nn:width=1024")
@option("--batch", Count, "Samples per rank and step.", 32)
@option("--repeats", Repeats, "Blocks of steps; the table shows medians.", 40)
def trace(**options: Any) -> None:
    """Overhead of --trace: training steps with and without it."""
    from hpcsgd.commands.bench.trace import main as measure

    measure(**options)
