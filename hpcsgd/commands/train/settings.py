"""The settings of ``hpcsgd train``: one definition for the command line and for TOML files."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import tomli_w

from hpcsgd import registry
from hpcsgd.commands.train import sweep
from hpcsgd.errors import BadOption

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


def option(
    default: object,
    help: str,
    unit: str | None = None,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declare one setting: its default, help text, unit, and valid values.

    Parameters
    ----------
    default
        The default value.
    help
        One sentence for ``--help``.
    unit
        Unit of the value.
    low, high
        Smallest and largest valid value.
    choices
        The valid values, if these are listed.
    """
    about = {"help": help, "unit": unit, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """All settings of a training run; `merge` and `validate` check them."""

    data: str = option("digits", "Data set, as NAME:key=value,key=value.")
    model: str = option("", "Model, as NAME:key=value or module:callable; empty: the default for the data.")
    strategy: str = option("allreduce", "Method of distributed SGD, as NAME:key=value,key=value.")
    connect: str = option(
        "",
        "FILE of `hpcsgd serve --listen FILE`, whose servers hold the model of --strategy ps; empty: none.",
    )
    virtual_nodes: int | None = option(
        None,
        "Number of peers of a gossip method, a multiple of the ranks: each rank trains several models; "
        "none: one model a rank.",
        low=1,
    )
    compress: str = option(
        "none", "Compression of messages, as NAME:key=value,key=value; ef+NAME adds error feedback."
    )
    nonfinite: str = option(
        "error",
        "Reaction to NaN or infinity in a gradient with compression: raise an error, or skip the step; "
        "--autocast float16 always skips.",
        choices=("error", "skip"),
    )
    optimizer: str = option("sgd:momentum=0.9", "Optimizer, as NAME:key=value,key=value.")
    learning_rate: float = option(0.1, "Learning rate after the warm-up, before the schedule.", low=0.0)
    schedule: str = option(
        "cosine",
        "Learning-rate schedule after the warm-up.",
        choices=("constant", "cosine", "step"),
    )
    warmup: float = option(0.0, "Length of the linear warm-up of the learning rate.", "epochs", low=0.0)
    batch: int = option(32, "Samples per rank and backward pass.", "samples", low=1)
    epochs: float = option(20.0, "Length of the run; may be a fraction.", "epochs", low=0.0)
    alpha: float | None = option(
        None,
        "Dirichlet parameter of the label skew between ranks: the smaller, the more skewed; none: IID.",
        low=0.001,
    )
    seed: int = option(0, "Seed of all random numbers.", low=0, high=2**32 - 1)
    clip: float | None = option(
        None, "Norm to which larger gradients are clipped; none: no clipping.", low=1e-6
    )
    accumulate: int = option(1, "Backward passes per step (gradient accumulation).", low=1)
    delays: str = option(
        "none",
        "Simulated stragglers, as NAME:key=value,key=value: ranks sleep before each gradient is ready.",
    )
    bucket_mib: float = option(4.0, "Size of a communication bucket.", "MiB", low=0.001)
    algorithm: str = option(
        "auto", "All-reduce algorithm.", choices=("auto", "library", "ring", "node", "two-level")
    )
    buffers: str = option(
        "broadcast",
        "Buffers (BatchNorm statistics) at evaluation: those of rank 0, their mean, or each rank's own.",
        choices=("broadcast", "average", "local"),
    )
    evaluate_every: float = option(1.0, "Period of evaluations; 0: only at the end.", "epochs", low=0.0)
    log_every: int = option(10, "Period of records of training in metrics.jsonl.", "steps", low=1)
    checkpoint_every: float = option(
        1.0, "Period of checkpoints; 0: only at the end and on signals.", "epochs", low=0.0
    )
    out: str = option("runs", "Folder in which the run's folder is created.")
    name: str = option("", "Name of the run's folder; empty: time stamp and strategy.")
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
    on_failure: str = option(
        "stop",
        "Policy when a rank dies. stop: the run stops; restart: it stops, and any number of ranks may "
        "--resume it; shrink: it continues on the surviving ranks (needs Open MPI's mpiexec --with-ft ulfm).",
        choices=("stop", "restart", "shrink"),
    )
    keep_every: float = option(
        0.25, "Period of in-memory checkpoints for --on-failure shrink.", "epochs", low=0.001
    )
    device: str = option(
        "auto", "Device of the model; auto: CUDA if available.", choices=("auto", "cpu", "cuda")
    )
    autocast: str = option(
        "off",
        "Reduced precision of the forward pass (torch.autocast).",
        choices=("off", "bfloat16", "float16"),
    )
    threads: int = option(0, "Compute threads per rank; 0: its share of the node's cores.", low=0)
    timeout: float = option(300.0, "Deadline of each wait for other ranks.", "s", low=0.1)
    uneven: str = option(
        "join",
        "Epochs in which ranks have unequal numbers of batches. join: ranks without batches take part until "
        "the last rank is done; stop: the epoch ends when the first rank is done.",
        choices=("join", "stop"),
    )
    progress: str = option(
        "auto",
        "Output while training; auto: a bar on a terminal, else plain lines.",
        choices=("auto", "bar", "plain", "off"),
    )


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_HINTS = typing.get_type_hints(Settings)


def default_model(data: str) -> str:
    """Return the name of the model that `Settings.model` stands for if it is empty.

    Parameters
    ----------
    data
        The data set's spec.

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
    """Combine the values of a file with those of the command line, which take precedence, and check them.

    Raises
    ------
    BadOption
        An unknown name, or an invalid value, as in `validate`.
    """
    values: dict[str, Any] = {**toml, **command_line}
    _check_names(values, "the settings")
    return validate(Settings(**values))


def from_toml(path: str | Path, element: int | None = None) -> dict[str, object]:
    """Read the settings in a TOML file, for `merge`; its ``[world]`` table is ignored.

    Parameters
    ----------
    path
        Path of the file.
    element
        Number of the run of a sweep, as in `sweep.select_run`.

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

    Parameters
    ----------
    settings
        The settings.
    extra
        Contents of the ``[world]`` table, for the reader's information.
    """
    values = {
        name: "none" if value is None else value for name, value in dataclasses.asdict(settings).items()
    }
    return tomli_w.dumps({**values, _WORLD: dict(extra)} if extra else values)


def click_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add one option per setting, ``--config FILE`` and ``--element N`` to a click command.

    The function gets the checked settings as its argument ``settings``. The command line takes precedence
    over the file; a resumed run uses its own file. Texts that are not numbers reach `validate`, so that
    files and the command line raise the same errors.
    """

    @functools.wraps(function)
    def with_settings(*args: Any, config: str | None, element: int | None, **values: Any) -> R:
        given = {name: values.pop(name) for name in FIELDS}
        read = {name: _parsed(name, text) for name, text in given.items() if text is not None}
        if not config and read.get("resume", "") not in ("", AUTO):
            config = str(parse_resume(str(read["resume"]))[0] / "config.toml")
        if not config and element is not None:
            raise BadOption("--element needs a sweep", do="name the file of the sweep: --config FILE")
        settings = merge(from_toml(config, element) if config else {}, read)
        return function(*args, settings=settings, **values)

    for name in reversed(FIELDS):
        flag = "--" + name.replace("_", "-")
        metavar = _type(name).__name__.upper().replace("STR", "TEXT")
        with_settings = click.option(flag, name, metavar=metavar, help=_help(name))(with_settings)
    about = "Number of the run, from 0, in a sweep: a --config file with tables [[run]]."
    with_settings = click.option("--element", metavar="INT", type=int, help=about)(with_settings)
    about = "TOML file of settings, such as the config.toml of an earlier run."
    return click.option("--config", metavar="FILE", help=about)(with_settings)


def _type(name: str) -> type:
    hint: Any = _HINTS[name]
    return hint if isinstance(hint, type) else typing.cast(type, typing.get_args(hint)[0])


def _optional(name: str) -> bool:
    return FIELDS[name].default is None


def _none_if_unset(name: str, value: object) -> object:
    return None if _optional(name) and value == "none" else value


def _parsed(name: str, text: str) -> object:
    value = _none_if_unset(name, text)
    try:
        return value if value is None else _type(name)(value)
    except ValueError:
        return value


def _checked(name: str, value: Any) -> Any:
    expected_type: Any = _type(name)
    about = FIELDS[name].metadata
    if value is None and _optional(name):
        return None
    if expected_type is float and type(value) is int and value.bit_length() < 1024:
        value = float(value)
    low, high, choices = about["low"], about["high"], about["choices"]
    fits = (
        type(value) is expected_type
        and (expected_type is not float or math.isfinite(value))
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (choices is None or value in choices)
    )
    if not fits:
        what = f"option {name!r} has a wrong value"
        raise BadOption(what, expected=_expected(name), got=repr(value))
    return value


def _expected(name: str) -> str:
    about = FIELDS[name].metadata
    if about["choices"]:
        return "one of " + ", ".join(about["choices"])
    words = {int: "a whole number", float: "a number", str: "a text"}[_type(name)]
    if about["low"] is not None:
        words += f" of at least {about['low']:g}" if about["high"] is None else ""
    if about["high"] is not None:
        words += f" from {about['low']} to {about['high']}"
    return words + (", or none" if _optional(name) else "")


def _help(name: str) -> str:
    about: Any = FIELDS[name].metadata
    default: Any = FIELDS[name].default
    shown = {None: "none", "": "empty"}.get(default, default)
    facts = [f"in {about['unit']}"] if about["unit"] else []
    if about["choices"] or about["low"] is not None:
        facts.append(_expected(name))
    return f"{about['help']}  [{'; '.join([*facts, f'default: {shown}'])}]"


def _check_names(names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=3, cutoff=0.5)
            rest = sorted(set(FIELDS) - set(near))
            remedy = "use one of: " + ", ".join([*near, *rest])
            raise BadOption(f"{where}: unknown option {name!r}", do=remedy)
