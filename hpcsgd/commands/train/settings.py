"""The settings of ``hpcsgd train``: one definition for the command line and for TOML files."""

# ruff: noqa: RUF009 - `option` returns a field

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w

from hpcsgd import registry
from hpcsgd.commands.options import CompressSpec, DataSpec, DelaysSpec, ModelSpec, OptimizerSpec, StrategySpec
from hpcsgd.commands.train import sweep
from hpcsgd.errors import BadOption
from hpcsgd.registry import Text, Within
from hpcsgd.registry.limits import BucketMib, Count, PeerCount, Skew, Timeout
from hpcsgd.training import choices

R = TypeVar("R")

# Written by `to_toml` for the reader's information, and ignored by `from_toml`.
_WORLD = "world"
#: Value of `resume`: resume the run if it has a checkpoint, else start it.
AUTO = "auto"

_DEFAULT_MODELS = {
    "digits": "2nn",
    "text": "gpt",
    "mnist": "lenet",
    "fashion-mnist": "lenet",
    "cifar10": "resnet20",
    "cifar100": "resnet20",
    "imagenet": "resnet50",
    "synthetic": "2nn",
}


#: What other programs call our settings.
NAMES_ELSEWHERE = {
    **dict.fromkeys(("lr", "base_lr", "step_size"), "learning_rate"),
    **dict.fromkeys(("lr_schedule", "lr_scheduler", "scheduler"), "schedule"),
    **dict.fromkeys(("warmup_epochs", "lr_warmup"), "warmup"),
    **dict.fromkeys(("bs", "batch_size", "train_batch_size", "per_device_train_batch_size"), "batch"),
    **dict.fromkeys(("dataset", "data_dir"), "data"),
    **dict.fromkeys(("arch", "net", "network"), "model"),
    **dict.fromkeys(("opt", "momentum", "weight_decay", "wd", "betas"), "optimizer"),
    **dict.fromkeys(("method", "algo", "sync"), "strategy"),
    **dict.fromkeys(("compression", "compressor", "bits"), "compress"),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_norm", "max_grad_norm"), "clip"),
    **dict.fromkeys(("accum", "accum_steps", "grad_accum", "gradient_accumulation_steps"), "accumulate"),
    **dict.fromkeys(("output", "output_dir", "save_dir", "logdir", "log_dir"), "out"),
    **dict.fromkeys(("run_name", "exp_name", "experiment"), "name"),
    **dict.fromkeys(("eval_every", "eval_interval", "eval_freq"), "evaluate_every"),
    **dict.fromkeys(("log_interval", "log_freq", "print_freq", "logging_steps"), "log_every"),
    **dict.fromkeys(("save_every", "save_freq", "save_steps"), "checkpoint_every"),
    **dict.fromkeys(("amp", "fp16", "bf16", "precision", "mixed_precision"), "autocast"),
    **dict.fromkeys(("num_epochs", "max_epochs", "num_train_epochs", "max_steps", "steps"), "epochs"),
    **dict.fromkeys(("bucket_cap_mb", "bucket_size"), "bucket_mib"),
    **dict.fromkeys(("dirichlet", "dirichlet_alpha", "skew"), "alpha"),
    **dict.fromkeys(("resume_from", "checkpoint", "ckpt"), "resume"),
    **dict.fromkeys(("num_threads", "omp_num_threads"), "threads"),
}


Epochs = Annotated[float, Within(0, 1e9)]


def option(default: object, help: str, unit: str | None = None, **click: Any) -> Any:
    """Declare one setting, whose annotation has its limits: its default, help text and unit.

    A setting without a default has `dataclasses.MISSING`. `click` are further arguments of `click.option`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit, "click": click})


@dataclass(frozen=True)
class Settings:
    """All settings of a training run; `merge` and `validate` check them."""

    data: DataSpec = option("digits", "Data set, as NAME:key=value,key=value.")
    model: Literal[""] | ModelSpec = option(
        "", "Model, as NAME:key=value or module:callable; empty: the default for the data."
    )
    strategy: StrategySpec = option("allreduce", "Method of distributed SGD, as NAME:key=value,key=value.")
    connect: str = option(
        "",
        "FILE of `hpcsgd serve --listen FILE`, whose servers hold the model of --strategy ps; empty: none.",
    )
    virtual_nodes: PeerCount | None = option(
        None,
        "Number of peers of a gossip method, a multiple of the ranks: each rank trains several models; "
        "none: one model a rank.",
    )
    compress: CompressSpec = option(
        "none", "Compression of messages, as NAME:key=value,key=value; ef+NAME adds error feedback."
    )
    nonfinite: choices.Nonfinite = option(
        "error",
        "Reaction to NaN or infinity in a gradient with compression: raise an error, or skip the step; "
        "--autocast float16 always skips.",
    )
    optimizer: OptimizerSpec = option("sgd:momentum=0.9", "Optimizer, as NAME:key=value,key=value.")
    learning_rate: Annotated[float, Within(0, 1e9)] = option(
        0.1, "Learning rate after the warm-up, before the schedule."
    )
    schedule: Literal["constant", "cosine", "step"] = option(
        "cosine", "Learning-rate schedule after the warm-up."
    )
    warmup: Epochs = option(0.0, "Length of the linear warm-up of the learning rate.", "epochs")
    batch: Count = option(32, "Samples per rank and backward pass.", "samples")
    epochs: Epochs = option(20.0, "Length of the run; may be a fraction.", "epochs")
    alpha: Skew | None = option(
        None, "Dirichlet parameter of the label skew between ranks: the smaller, the more skewed; none: IID."
    )
    seed: Annotated[int, Within(0, 2**32 - 1)] = option(0, "Seed of all random numbers.")
    clip: Annotated[float, Within(1e-6, 1e9)] | None = option(
        None, "Norm to which larger gradients are clipped; none: no clipping."
    )
    accumulate: Count = option(1, "Backward passes per step (gradient accumulation).")
    delays: DelaysSpec = option(
        "none",
        "Simulated stragglers, as NAME:key=value,key=value: ranks sleep before each gradient is ready.",
    )
    bucket_mib: BucketMib = option(4.0, "Size of a communication bucket.", "MiB")
    algorithm: choices.Algorithm = option("auto", "All-reduce algorithm.")
    buffers: choices.Buffers = option(
        "broadcast",
        "Buffers (BatchNorm statistics) at evaluation: those of rank 0, their mean, or each rank's own.",
    )
    evaluate_every: Epochs = option(1.0, "Period of evaluations; 0: only at the end.", "epochs")
    log_every: Count = option(10, "Period of records of training in metrics.jsonl.", "steps")
    checkpoint_every: Epochs = option(
        1.0, "Period of checkpoints; 0: only at the end and on signals.", "epochs"
    )
    out: Annotated[str, Text(1)] = option("runs", "Folder in which the run's folder is created.")
    name: Annotated[str, Text(0, 255)] = option(
        "", "Name of the run's folder; empty: time stamp and strategy."
    )
    spare: str = option(
        "",
        "Folder for a checkpoint and the metrics while the run's own cannot be written, for its disk is full "
        "for example; empty: that of temporary files, if all ranks see it.",
    )
    resume: str = option(
        "",
        "Folder of a run, or of one of its checkpoints, to resume; auto: resume the run --name from its "
        "newest whole checkpoint, or start it if it has none; empty: start a new run.",
    )
    on_failure: Literal["stop", "restart", "shrink"] = option(
        "stop",
        "Policy when a rank dies. stop: the run stops; restart: it stops, and any number of ranks may "
        "--resume it; shrink: it continues on the surviving ranks (needs Open MPI's mpiexec --with-ft ulfm).",
    )
    keep_every: Annotated[float, Within(0.001, 1e9)] = option(
        0.25, "Period of in-memory checkpoints for --on-failure shrink.", "epochs"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device of the model; auto: CUDA if available.")
    autocast: Literal["off", "bfloat16", "float16"] = option(
        "off", "Reduced precision of the forward pass (torch.autocast)."
    )
    threads: Annotated[int, Within(0, 1024)] = option(
        0, "Compute threads per rank; 0: its share of the node's cores."
    )
    timeout: Timeout = option(300.0, "Deadline of each wait for other ranks.", "s")
    uneven: choices.Uneven = option(
        "join",
        "Epochs in which ranks have unequal numbers of batches. join: ranks without batches take part until "
        "the last rank is done; stop: the epoch ends when the first rank is done.",
    )
    progress: Literal["auto", "bar", "plain", "off"] = option(
        "auto", "Output while training; auto: a bar on a terminal, else plain lines."
    )


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
#: The annotation of each setting, with its limits.
KINDS = typing.get_type_hints(Settings, include_extras=True)


def default_model(data: str) -> str:
    """Return the name of the model that `Settings.model` stands for if it is empty, with a data set's spec.

    Raises
    ------
    BadOption
        The data set has no default model.
    """
    name, _ = registry.parse(data)
    if name not in _DEFAULT_MODELS:
        raise BadOption(
            f"data set {name!r} has no default model", do="give --model NAME or --model module:callable"
        )
    return _DEFAULT_MODELS[name]


def parse_resume(resume: str) -> tuple[Path, int | None]:
    """Return the run's folder, and the step if `resume` names one of its checkpoints."""
    path = Path(resume)
    step = re.fullmatch(r"step-(\d+)", path.name)
    if step and path.parent.name == "checkpoints":
        return path.parents[1], int(step[1])
    return path, None


def validate(settings: Settings) -> Settings:
    """Check every value; convert integers to float where the setting is a float.

    Raises
    ------
    BadOption
        A value has a wrong type, or is out of range or not among the choices.
    """
    return Settings(**{name: _checked(name, getattr(settings, name)) for name in FIELDS})


def merge(toml: Mapping[str, object], command_line: Mapping[str, object]) -> Settings:
    """Combine the values of a file with those of the command line, which take precedence, for `validate`.

    Raises
    ------
    BadOption
        An unknown name.
    """
    values: dict[str, Any] = {**toml, **command_line}
    _check_names(values, "the settings")
    return Settings(**values)


def from_toml(path: str | Path, element: int | None = None) -> dict[str, object]:
    """Read the settings in a TOML file, for `merge`; its ``[world]`` table is ignored.

    `element` is the number of the run of a sweep, as in `sweep.select_run`.

    Raises
    ------
    BadOption
        The file cannot be read, is not TOML, or has an unknown setting; or the element does not exist.
    """
    table = sweep.select_run(read_toml(path), path, element)
    table.pop(_WORLD, None)
    _check_names(table, str(path))
    return {name: _none_if_unset(name, value) for name, value in table.items()}


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises
    ------
    BadOption
        The file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode())
    except (OSError, ValueError) as error:
        raise BadOption(
            f"cannot read settings from {path}: {error}", do="correct the file, or give the path of another"
        ) from error


def to_toml(settings: Settings, extra: Mapping[str, object]) -> str:
    """Return all settings as TOML, which `from_toml` reads again; None is written as ``"none"``.

    `extra` is the ``[world]`` table, for the reader's information.
    """
    values = {
        name: "none" if value is None else value for name, value in dataclasses.asdict(settings).items()
    }
    return tomli_w.dumps({**values, _WORLD: dict(extra)} if extra else values)


def _none_if_unset(name: str, value: object) -> object:
    return None if FIELDS[name].default is None and value == "none" else value


def _checked(name: str, value: object) -> Any:
    return registry.check(f"option {name!r}", value, KINDS[name])


def _check_names(names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in FIELDS:
            meant = NAMES_ELSEWHERE.get(name)
            near = [meant] if meant else difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.5)
            rest = sorted(set(FIELDS) - set(near))
            remedy = "use one of: " + ", ".join([*near, *rest])
            raise BadOption(f"{where}: unknown option {name!r}", do=remedy)
