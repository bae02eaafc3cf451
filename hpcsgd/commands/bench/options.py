"""The options of each benchmark: the fields of a dataclass, whose docstring is the help of the command."""

# ruff: noqa: RUF009 - `option` returns a field

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hpcsgd.commands.options import (
    CompressSpec,
    DataSpec,
    DelaysSpec,
    ModelSpec,
    OptimizerSpec,
    Options,
    ShortCount,
    StrategySpec,
    TopologySpec,
    ValueByName,
    Values,
)
from hpcsgd.commands.train.settings import Epochs, option
from hpcsgd.registry import Accepted, Within
from hpcsgd.registry.limits import BucketMib, Count, PeerCount, Size, Skew
from hpcsgd.training import choices


def _check_link(text: str) -> None:
    if not re.fullmatch(r"[\w.]{1,64}", text):
        raise ValueError(text)


class _Models(Values):
    def split(self, text: str) -> list[str]:
        # At the commas that no option follows: a model's name has no "=".
        return re.split(r",(?![^,:]*=)", text)


Repeats = Annotated[int, Within(1, 10**6)]
Seeds = Annotated[int, Within(1, 10**4)]
Rate = Annotated[float, Within(0, 1e9)]
Positive = Annotated[float, Within(1e-3, 1e9)]
Kib = Annotated[float, Within(1 / 256, 1e9)]
Elements = Annotated[int, Within(1, 10**12)]
Device = Literal["cpu", "cuda"]
#: A label that may be part of a run's name.
Link = Annotated[str, Accepted(_check_link, "100mbit, of letters, digits, dots and underscores")]
Methods = Annotated[Sequence[str], Values(StrategySpec, ";")]


def _csv() -> Any:
    return option(None, "Also write the results to this CSV file.")


def _algorithm() -> Any:
    return option("auto", "As --algorithm of hpcsgd train.")


def _link_mbit(use: str) -> Any:
    return option(None, f"Link rate of each host in Mbit/s; {use}.")


def _methods(*specs: str) -> Any:
    return option(";".join(specs), "Strategies separated by ';', each as --strategy of hpcsgd train.")


def _trained(name: str, default: str | None, after: str = "") -> Any:
    return option(default, f"As --{name} of hpcsgd train.{after}")


def _out(default: str, content: str = "the CSV file and the plot") -> Any:
    return option(Path(default), f"Folder of the runs, {content}.")


@dataclass(frozen=True)
class AllReduceOptions(Options):
    """All-reduce (mean) by hpcsgd, MPI and gloo, and the limit.

    The limit is a memory copy on one node, and --link-mbit between nodes.
    """

    sizes: Annotated[Sequence[float], Values(Kib)] = option(
        "4,256,4096,65536", "Buffer sizes in KiB of float32, comma-separated."
    )
    repeats: Repeats = option(10, "Repetitions; the table shows medians.")
    algorithm: choices.Algorithm = _algorithm()
    link_mbit: Positive | None = _link_mbit("sets the limit between hosts")
    device: Device = option("cpu", "cuda measures buffers in device memory.")
    csv: Path | None = _csv()


@dataclass(frozen=True)
class StepOptions(Options):
    """Training step: hpcsgd, DDP over gloo, and no communication."""

    models: Annotated[Sequence[str], _Models(ModelSpec)] = option(
        "resnet18,gpt", "Models, comma-separated, as --model of hpcsgd train."
    )
    batch: Count = option(16, "Samples per rank and step.")
    repeats: Repeats = option(10, "Blocks of steps; the table shows medians.")
    device: Device = option("cpu", "cuda trains on the GPU, with batches that are already there.")
    # The gloo of an older torch cannot add bfloat16 ("Invalid scalar type", pytorch #111131).
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Type of parameters, gradients and optimizer state."
    )
    context: Size = option(64, "Tokens per sample of gpt.")
    compress: CompressSpec | None = option(
        None, "Also train with this scheme, as --compress of hpcsgd train."
    )
    bucket_mib: BucketMib = option(4.0, "Size of hpcsgd's buckets in MiB.")
    csv: Path | None = _csv()
    steps: int = 3  # per block


@dataclass(frozen=True)
class CompressOptions(Options):
    """Compression schemes: time, bytes and error.

    They are measured beside float32, gloo and the hooks of DDP.
    """

    schemes: Annotated[Sequence[str], Values(CompressSpec, ";")] = option(
        "fp16;bf16;maxnorm:bits=2;maxnorm:bits=4;maxnorm:bits=8;maxnorm:scale=bucket;multiscale;"
        "hadamard+maxnorm;ef+maxnorm;randk-maxnorm;powersgd;ef+powersgd;topk;signsgd",
        "Compression schemes separated by ';', each as --compress of hpcsgd train.",
    )
    elements: Annotated[int, ShortCount(Elements)] | None = option(
        None,
        "Gradient elements, for example 64k or 11.2M. Default: those of ResNet-18 (11.2M), and for the "
        "kernels 16.8M, on a GPU 134M.",
    )
    data: Literal["gaussian", "resnet18", "both"] = option(
        "both", "Gradients to compress: standard normal samples, or recorded from training a ResNet-18."
    )
    repeats: Repeats = option(5, "Repetitions; the tables show medians.")
    device: Device = option("cpu", "cuda measures the kernels only, on the GPU.")
    bucket_mib: BucketMib = option(4.0, "Bucket size in MiB.")
    algorithm: choices.Algorithm = _algorithm()
    csv: Path | None = _csv()


@dataclass(frozen=True)
class StragglerOptions(Options):
    """Simulated stragglers: time per iteration and to an accuracy.

    The accuracy is --target. A study that was interrupted continues with the same command.
    """

    methods: Methods = _methods(
        "allreduce", "backup:backups=0", "backup:backups=1", "backup", "dsgd", "adpsgd"
    )
    delays: Annotated[Sequence[str], Values(DelaysSpec, ";")] | None = option(
        None,
        "Simulated delays separated by ';', each as --delays of hpcsgd train. Default: constant, one slow "
        "rank, exponential, Pareto.",
    )
    topology: TopologySpec = option("ring", "Topology of the methods that do not name one.")
    base_ms: Positive = option(20.0, "Simulated gradient time of the default delays, in ms.")
    seeds: Seeds = option(3, "Runs per method and delay; medians are shown.")
    target: Annotated[float, Within(1e-6, 1)] = option(0.9, "Target test accuracy, from 0 to 1.")
    epochs: Epochs = option(5.0, "Epochs per run.")
    # All ranks synchronise before an evaluation, and the wait counts as training time.
    evaluate_every: Epochs = option(1.0, "Epochs between evaluations.")
    optimizer: OptimizerSpec = _trained("optimizer", "adam")
    learning_rate: Rate = option(0.005, "Constant learning rate of all methods.")
    data: DataSpec = _trained("data", "digits")
    alpha: Skew | None = _trained("alpha", None, " Default: IID shards.")
    out: Path = _out("straggler")


@dataclass(frozen=True)
class ScaleOptions(Options):
    """Accuracy of gossip methods by the number of virtual nodes.

    The data are skewed (--alpha). A study that was interrupted continues with the same command.
    """

    methods: Methods = _methods(
        *(f"dsgd:topology={each}" for each in ("ring", "exponential", "one-peer-exponential", "base")),
        "teleport",
    )
    nodes: Annotated[Sequence[int], Values(PeerCount)] = option(
        "8,16,32,64", "Numbers of virtual nodes, multiples of the ranks, comma-separated."
    )
    active: Annotated[Mapping[str, int], ValueByName(PeerCount)] = option(
        "4", "Active nodes of teleport: one number, or NODES=ACTIVE for each of --nodes (8=2,16=4)."
    )
    seeds: Seeds = option(3, "Runs per method; mean and standard deviation are shown.")
    steps: Count = option(150, "Iterations per run.")
    batch: Count = option(8, "Samples per node and iteration.")
    alpha: Skew = option(0.1, "Dirichlet parameter of the label skew between nodes.")
    # The best of 0.03, 0.1 and 0.3 at 16 nodes.
    learning_rate: Annotated[Mapping[str, float], ValueByName(Rate)] = option(
        "dsgd=0.3,teleport=0.1",
        "NAME=RATE for each method, comma-separated, or one number for all; with cosine decay.",
    )
    optimizer: OptimizerSpec = _trained("optimizer", "sgd:momentum=0.9")
    model: ModelSpec = _trained("model", "2nn:width=64")
    data: DataSpec = _trained("data", "digits")
    out: Path = _out("scale")


_FITS = " Default: fits --data."


@dataclass(frozen=True)
class StudyOptions(Options):
    """Options of the studies with a launch per link; None: that of the study's workload."""

    data: Literal["digits", "text"] = option(
        "digits", "Data set; the model and the options below have defaults for each."
    )
    link: Link = option(
        "fast",
        "Label of this launch's network, for run names and tables; it does not change the network. Launches "
        "with other labels add to the same --out.",
    )
    seeds: Seeds = option(3, "Runs per method and condition.")
    target: Positive | None = option(None, f"Target test loss.{_FITS}")
    base_ms: Positive | None = option(
        None, f"Simulated gradient time in ms; four times as long on slow ranks.{_FITS}"
    )
    model: ModelSpec | None = _trained("model", None, _FITS)
    optimizer: OptimizerSpec | None = _trained("optimizer", None, _FITS)
    learning_rate: Rate | None = option(
        None, f"Learning rate of all methods, constant after --warmup.{_FITS}"
    )
    warmup: Epochs | None = option(None, f"Epochs of linear learning rate warm-up.{_FITS}")
    clip: Positive | None = option(None, f"Largest gradient norm.{_FITS}")
    batch: Count | None = option(None, f"Samples per rank and step.{_FITS}")
    epochs: Epochs | None = option(None, f"Epochs per run.{_FITS}")
    evaluate_every: Epochs | None = option(None, f"Epochs between evaluations.{_FITS}")
    methods: Methods = ()
    out: Path = Path()


@dataclass(frozen=True)
class AsyncOptions(StudyOptions):
    """Synchronous and asynchronous SGD: time to a target test loss.

    The methods are all-reduce, local SGD, gossip and LASGD. Each runs with equal ranks and with one
    simulated slow rank. A study that was interrupted continues with the same command.
    """

    methods: Methods = _methods("allreduce", "local:period=8", "sgp", "adpsgd", "lasgd:period=auto")
    out: Path = _out("async", "CSV and Markdown tables and plot")


@dataclass(frozen=True)
class ServerOptions(StudyOptions):
    """Parameter servers and all-reduce: time to a target test loss.

    Each method runs with equal ranks and with two simulated slow ranks. Start it with mpiexec -n 9: the last
    rank is the server, and all-reduce uses the other eight. A study that was interrupted continues with the
    same command.
    """

    methods: Methods = _methods(
        "allreduce", *(f"ps:mode={m},groups={g}" for m in ("sync", "async", "elastic") for g in (8, 4))
    )
    out: Path = _out("ps", "CSV and Markdown tables and plot")


@dataclass(frozen=True)
class PushOptions(Options):
    """Push and pull of a model over MPI, and over TCP.

    Over TCP the server writes its update log. Start it with mpiexec -n 2: the second rank is the parameter
    server.
    """

    mib: Annotated[float, Within(1e-3, 1e6)] = option(64.0, "Model size in MiB of float32.")
    repeats: Repeats = option(5, "Repetitions; the table shows medians.")
    listen: Path = option(Path("bench-push"), "Rendezvous file in a folder that both ranks share.")
    link_mbit: Positive | None = _link_mbit("the rates are compared to it")
    csv: Path | None = _csv()


@dataclass(frozen=True)
class TraceOptions(Options):
    """Overhead of --trace: training steps with and without it."""

    model: ModelSpec = _trained("model", "2nn:width=1024")
    batch: Count = option(32, "Samples per rank and step.")
    repeats: Repeats = option(40, "Blocks of steps; the table shows medians.")
    steps: int = 5  # per block


@dataclass(frozen=True)
class StartupOptions(Options):
    """Parts of a command's start and end, beside the bare imports.

    A second start without MPI_Init, of the bare imports alone, comes first, on all ranks at once.
    """

    csv: Path | None = _csv()
