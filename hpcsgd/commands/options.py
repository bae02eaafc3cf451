"""Types of options on the command line; the modules that know specs are imported when one is read."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click

from hpcsgd import compress, registry, strategies
from hpcsgd.errors import BadOption, shown
from hpcsgd.registry import Accepted, Text, Within
from hpcsgd.training import data, models

#: Names of `--optimizer`; the options are those of torch's classes.
OPTIMIZERS: registry.Rows[Any] = registry.Rows(
    "optimizer", "hpcsgd.commands.train.optimizers", {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}
)

T = TypeVar("T", bound="Options")


def _optimizer(spec: str) -> None:
    registry.bind(OPTIMIZERS, spec, "optimizer", params=None, lr=None)


def _delays(spec: str) -> None:
    from hpcsgd.strategies import delays  # NumPy, which no `--help` needs

    delays.build(spec)


def _topology(spec: str) -> None:
    from hpcsgd import topology

    topology.check(spec)


StrategySpec = Annotated[str, Accepted(strategies.build, check_name=strategies.STRATEGIES.check_name)]
CompressSpec = Annotated[str, Accepted(compress.build, check_name=compress.check_name)]
DelaysSpec = Annotated[str, Accepted(_delays)]
TopologySpec = Annotated[str, Accepted(_topology)]
DataSpec = Annotated[str, Accepted(data.check, check_name=data.DATASETS.check_name)]
ModelSpec = Annotated[str, Accepted(models.check, check_name=models.check_name)]
OptimizerSpec = Annotated[str, Accepted(_optimizer, check_name=OPTIMIZERS.check_name)]
#: A text that names something.
Label = Annotated[str, Text(1, 255)]


class Value(click.ParamType):  # type: ignore[type-arg]
    """A value of an annotation, within its limits."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.name = registry.type_name(kind).strip("|").replace("str", "text")

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the range of a number, the words of a choice, or the type."""
        limits = [str(each) for each in get_args(self.kind)[1:] if isinstance(each, Within)]
        if get_origin(self.kind) is Literal:
            return f"[{self.name}]"
        return limits[0].removeprefix("from ").replace(" to ", "..") if limits else self.name.upper()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a default
        try:
            return self.parse(value)
        except BadOption as error:
            self.fail(str(error), param, ctx)
        except ValueError:
            self.fail(f"expected {self.expected}, got {shown(value)}", param, ctx)

    def parse(self, text: str) -> Any:
        """Return the value; raise `ValueError` for another text."""
        return registry.convert(text, self.kind)

    @property
    def expected(self) -> str:
        """The valid values in words."""
        return registry.expected(self.kind)


class Values(Value):
    """One or more values of an annotation, each once."""

    def __init__(self, kind: Any, separator: str = ",") -> None:
        super().__init__(kind)
        self.separator = separator

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the type of two values."""
        return self.separator.join([self.name.upper()] * 2)

    def parse(self, text: str) -> list[Any]:
        parts = [part.strip() for part in self.split(text)]
        values = [super(Values, self).parse(part) for part in parts if part]
        if not values or len(set(values)) < len(values):
            raise ValueError
        return values

    def split(self, text: str) -> list[str]:
        """Return the texts of the values."""
        return text.split(self.separator)

    @property
    def expected(self) -> str:
        """The valid values in words."""
        return f"one or more, each once and separated by {self.separator!r}, each {super().expected}"


class ValueByName(Value):
    """NAME=VALUE for some names, separated by commas, or one value for all, whose name is then empty."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the type, and that a name may come before it."""
        return f"[NAME=]{self.name.upper()}"

    def parse(self, text: str) -> dict[str, Any]:
        pairs = [part.rpartition("=") for part in text.split(",")]
        return {name.strip(): super(ValueByName, self).parse(value.strip()) for name, _, value in pairs}

    @property
    def expected(self) -> str:
        """The valid values in words."""
        return f"one value, or NAME=VALUE separated by commas, each {super().expected}"


class ShortCount(Value):
    """A number that may end in k (thousands) or M (millions)."""

    def parse(self, text: str) -> int:
        scale = {"k": 1e3, "M": 1e6}.get(text[-1:], 1)
        number = float(text[:-1] if scale > 1 else text) * scale
        return int(registry.check("", round(number) if math.isfinite(number) else number, self.kind))

    @property
    def expected(self) -> str:
        """The valid values in words."""
        return f"{super().expected}, such as 65536, 64k or 11.2M"


def option(
    flag: str, kind: Any, help: str, default: object = None, *, short: str = "", **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare an option with a value; `more` are further arguments of `click.option`.

    `kind` is the annotation of the value, or a click type; with the default None the option may be absent.
    """
    kind = kind if isinstance(kind, click.ParamType) else Value(kind)
    if default is not None:
        more |= {"default": default, "show_default": default != ""}
    return click.option(*([short] if short else []), flag, type=kind, help=help, **more)


@dataclass(frozen=True)
class Options:
    """The options of a command; a subclass has a field for each.

    A field that is declared with `settings.option` is an option; its default is a value, or the text that a
    user would give. Others are for Python only. An annotation has the limits of the value, or a `Value`.
    """

    def __post_init__(self) -> None:
        kinds = _kinds(type(self))
        for field in _declared(type(self)):
            if getattr(self, field.name) is field.default:
                object.__setattr__(self, field.name, kinds[field.name].convert(field.default, None, None))


def command(name: str, options: type[T], run: Callable[[T], object]) -> click.Command:
    """Return a command that calls `run` with its options; the help is the docstring of their dataclass."""

    def call(**values: Any) -> None:
        run(options(**values))

    return click.command(name, help=inspect.getdoc(options))(add_options(options, call))


def add_options(options: type[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with an option for each field of a dataclass that is declared as one."""
    kinds = _kinds(options)
    for field in reversed(_declared(options)):
        name, help, kind = field.name.replace("_", "-"), field.metadata["help"], kinds[field.name]
        default, more = field.default, field.metadata["click"]
        if kind.kind is bool:
            flag = f"--{name}/--no-{name}" if default is None else f"--{name}"
            function = click.option(flag, is_flag=True, default=default, help=help, **more)(function)
        elif default is dataclasses.MISSING:
            function = option(f"--{name}", kind, help, required=True, **more)(function)
        else:
            function = option(f"--{name}", kind, help, default, **more)(function)
    return function


def _declared(options: type[Any]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(options) if "help" in field.metadata]


def _kinds(options: type[Any]) -> dict[str, Value]:
    hints = typing.get_type_hints(options, include_extras=True)
    return {field.name: _kind(hints[field.name]) for field in _declared(options)}


def _kind(annotation: Any) -> Value:
    if get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation):
        (annotation,) = (each for each in get_args(annotation) if each is not NoneType)
    given = [each for each in get_args(annotation) if isinstance(each, Value)]
    return given[0] if given else Value(annotation)
