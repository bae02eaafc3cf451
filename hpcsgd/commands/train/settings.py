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

# Written by `to_toml` for the reader's information; a run is not set up from it.
_WORLD = "world"
#: Of `resume`: go on if there is something to go on with.
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
    """Declare one setting: its default, what it means, its unit, and the values it may take.

    Parameters
    ----------
    default
        The value where none is given.
    help
        One sentence for ``--help``.
    unit
        Of the value.
    low, high
        Smallest and largest value, both allowed.
    choices
        The only values allowed.
    """
    about = {"help": help, "unit": unit, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """All settings of a training run; `merge` and `validate` check them."""

    data: str = option("digits", "Data set, as NAME:key=value,key=value.")
    model: str = option("", "Model, as NAME:key=value or module:callable; empty: fits the data.")
    strategy: str = option("allreduce", "How ranks agree, as NAME:key=value,key=value.")
    connect: str = option(
        "", "FILE of `hpcsgd serve --listen FILE`: its servers keep the model of --strategy ps; empty: none."
    )
    virtual_nodes: int | None = option(
        None,
        "Nodes of a gossip method, a multiple of the ranks, which train several each; none: the ranks.",
        low=1,
    )
    compress: str = option(
        "none", "Compression of what is reduced, as NAME:key=value; ef+NAME: with error feedback."
    )
    nonfinite: str = option(
        "error",
        "With compression: NaN or infinity in a gradient; --autocast float16 always skips.",
        choices=("error", "skip"),
    )
    optimizer: str = option("sgd:momentum=0.9", "Optimizer, as NAME:key=value,key=value.")
    learning_rate: float = option(0.1, "Learning rate after the warm-up.", low=0.0)
    schedule: str = option(
        "cosine",
        "Course of the learning rate after the warm-up.",
        choices=("constant", "cosine", "step"),
    )
    warmup: float = option(0.0, "Linear rise of the learning rate from 0.", "epochs", low=0.0)
    batch: int = option(32, "Samples per rank and backward pass.", "samples", low=1)
    epochs: float = option(20.0, "Length of the run; may be a fraction.", "epochs", low=0.0)
    alpha: float | None = option(
        None, "Dirichlet label skew between ranks, small is skewed; none: IID.", low=0.001
    )
    seed: int = option(0, "Seed of all that is random.", low=0, high=2**32 - 1)
    clip: float | None = option(None, "Largest norm of the gradient; none: any.", low=1e-6)
    accumulate: int = option(1, "Backward passes per step.", low=1)
    delays: str = option(
        "none", "Simulated stragglers: a rank sleeps before each gradient, as NAME:key=value,key=value."
    )
    bucket_mib: float = option(4.0, "Size of a communication bucket.", "MiB", low=0.001)
    algorithm: str = option(
        "auto", "All-reduce algorithm.", choices=("auto", "library", "ring", "node", "two-level")
    )
    buffers: str = option(
        "broadcast",
        "Buffers (BatchNorm's statistics) at evaluation: those of rank 0, the mean, or each its own.",
        choices=("broadcast", "average", "local"),
    )
    evaluate_every: float = option(1.0, "Time between evaluations; 0: only at the end.", "epochs", low=0.0)
    log_every: int = option(10, "Time between lines of metrics.", "steps", low=1)
    checkpoint_every: float = option(
        1.0, "Time between checkpoints; 0: only at the end and on signals.", "epochs", low=0.0
    )
    out: str = option("runs", "Folder in which the run's folder is made.")
    name: str = option("", "Name of the run's folder; empty: time stamp and strategy.")
    resume: str = option(
        "",
        "Folder of a run, or of one of its checkpoints, to go on with; auto: the run of --name if it has a "
        "checkpoint; empty: start a new one.",
    )
    on_failure: str = option(
        "stop",
        "When a rank dies: stop; or restart: stop too, and let any number of ranks --resume; or shrink: "
        "go on with the others, under Open MPI's mpiexec --with-ft ulfm.",
        choices=("stop", "restart", "shrink"),
    )
    keep_every: float = option(
        0.25, "With --on-failure shrink: time between copies of the state in memory.", "epochs", low=0.001
    )
    device: str = option("auto", "Where tensors live.", choices=("auto", "cpu", "cuda"))
    autocast: str = option(
        "off", "Reduced precision in the forward pass.", choices=("off", "bfloat16", "float16")
    )
    threads: int = option(0, "Compute threads; 0: the cores of this rank's share.", low=0)
    timeout: float = option(300.0, "Longest wait for other ranks.", "s", low=0.1)
    uneven: str = option(
        "join",
        "What to do when ranks have unequal numbers of batches.",
        choices=("join", "stop"),
    )
    progress: str = option("auto", "What to print while training.", choices=("auto", "bar", "plain", "off"))


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_HINTS = typing.get_type_hints(Settings)


def default_model(data: str) -> str:
    """Name the model that a run trains where `Settings.model` is empty.

    Parameters
    ----------
    data
        The data set's spec.

    Raises
    ------
    BadOption
        No model is known to fit that data set.
    """
    name, _ = registry.parse(data)
    if name not in _DEFAULT_MODELS:
        raise BadOption(f"data set {name!r} has no default model", do="set option 'model'")
    return _DEFAULT_MODELS[name]


def resumed(resume: str) -> tuple[Path, int | None]:
    """The run's folder, and the step where `resume` names one of its checkpoints."""
    path = Path(resume)
    step = re.fullmatch(r"step-(\d+)", path.name)
    if step and path.parent.name == "checkpoints":
        return path.parents[1], int(step[1])
    return path, None


def validate(settings: Settings) -> Settings:
    """Check every value; a whole number becomes a float where a float is wanted.

    Raises
    ------
    BadOption
        A wrong type, or a value out of its range or choices.
    """
    return Settings(**{name: _checked(name, getattr(settings, name)) for name in FIELDS})


def merge(toml: Mapping[str, object], command_line: Mapping[str, object]) -> Settings:
    """Make settings of a file's values, overridden by the command line's, over the defaults.

    Raises
    ------
    BadOption
        An unknown name, a wrong type, or a value out of its range or choices.
    """
    values: dict[str, Any] = {**toml, **command_line}
    _check_names(values, "the settings")
    return validate(Settings(**values))


def from_toml(path: str | Path, element: int | None = None) -> dict[str, object]:
    """Read the settings that a TOML file gives, for `merge`; its ``[world]`` table is ignored.

    Parameters
    ----------
    path
        Of the file.
    element
        Which run of a sweep, see `sweep.choose`.

    Raises
    ------
    BadOption
        The file cannot be read, is not TOML, or names a setting that does not exist; or the element is wrong.
    """
    table = sweep.choose(read_toml(path), path, element)
    table.pop(_WORLD, None)
    _check_names(table, str(path))
    return {name: _unset(name, value) for name, value in table.items()}


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read what a TOML file holds, as it is.

    Raises
    ------
    BadOption
        The file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_bytes().decode())
    except (OSError, ValueError) as error:
        raise BadOption(f"cannot read settings from {path}: {error}") from error


def to_toml(settings: Settings, extra: Mapping[str, object]) -> str:
    """Write all settings as TOML that runs again; an unset one is ``"none"``.

    Parameters
    ----------
    settings
        What to write.
    extra
        The contents of the ``[world]`` table: what a reader may want to know of the run.
    """
    values = {
        name: "none" if value is None else value for name, value in dataclasses.asdict(settings).items()
    }
    return tomli_w.dumps({**values, _WORLD: dict(extra)} if extra else values)


def click_options(function: Callable[..., R]) -> Callable[..., R]:
    """Give a click command one option per setting, ``--config FILE`` and ``--element N``.

    The function gets the checked result as its argument ``settings``. The command line wins over
    the file; a run to go on with brings its own file. Texts that are no number reach `validate`, so
    that one function words all errors.
    """

    @functools.wraps(function)
    def with_settings(*args: Any, config: str | None, element: int | None, **values: Any) -> R:
        given = {name: values.pop(name) for name in FIELDS}
        read = {name: _number(name, text) for name, text in given.items() if text is not None}
        if not config and read.get("resume", "") not in ("", AUTO):
            config = str(resumed(str(read["resume"]))[0] / "config.toml")
        if not config and element is not None:
            raise BadOption("--element is of a sweep", do="name its file with --config")
        settings = merge(from_toml(config, element) if config else {}, read)
        return function(*args, settings=settings, **values)

    for name in reversed(FIELDS):
        flag = "--" + name.replace("_", "-")
        metavar = _kind(name).__name__.upper().replace("STR", "TEXT")
        with_settings = click.option(flag, name, metavar=metavar, help=_help(name))(with_settings)
    about = "Of a file with tables [[run]], a sweep: which of them, from 0; on top of what comes before them."
    with_settings = click.option("--element", metavar="INT", type=int, help=about)(with_settings)
    about = "TOML file of settings, such as the config.toml of an earlier run."
    return click.option("--config", metavar="FILE", help=about)(with_settings)


def _kind(name: str) -> type:
    hint: Any = _HINTS[name]
    return hint if isinstance(hint, type) else typing.cast(type, typing.get_args(hint)[0])


def _optional(name: str) -> bool:
    return FIELDS[name].default is None


def _unset(name: str, value: object) -> object:
    return None if _optional(name) and value == "none" else value


def _number(name: str, text: str) -> object:
    value = _unset(name, text)
    try:
        return value if value is None else _kind(name)(value)
    except ValueError:
        return value


def _checked(name: str, value: Any) -> Any:
    kind: Any = _kind(name)
    about = FIELDS[name].metadata
    if value is None and _optional(name):
        return None
    if kind is float and type(value) is int and value.bit_length() < 1024:
        value = float(value)
    low, high, choices = about["low"], about["high"], about["choices"]
    fits = (
        type(value) is kind
        and (kind is not float or math.isfinite(value))
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
    words = {int: "a whole number", float: "a number", str: "a text"}[_kind(name)]
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
