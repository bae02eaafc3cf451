"""Values of options: converted from text, and checked, by the annotation of their parameter or field."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from hpcsgd.errors import BadOption, shown
from hpcsgd.registry.limits import Accepted, Limit, Text, Within

P = ParamSpec("P")
R = TypeVar("R")

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
#: Limits of values whose annotation has none, as those of other packages.
_LIMITS: dict[Any, tuple[Limit, ...]] = {
    bool: (),
    int: (Within(-(10**18), 10**18),),
    float: (Within(-1e308, 1e308),),
    str: (Text(),),
    Path: (Text(1),),
}
_NOUNS = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def is_option(kind: Any) -> bool:
    """Return whether values with this annotation can be written as text."""
    if _is_union(kind):
        return bool(_members(kind))
    if get_origin(kind) is tuple:
        return all(map(is_option, _elements(kind)))
    return _base(kind) in _LIMITS or get_origin(kind) is Literal


def read(name: str, text: str, kind: Any) -> Any:
    """Convert the text of an option, as `convert`; `name` is that of the option, for the error.

    Raises
    ------
    BadOption
        The text is no such value; in one line, with the valid ones.
    """
    return _or_refuse(name, text, kind, convert)


def check(name: str, value: object, kind: Any) -> Any:
    """Return the value of an option, integers as float where the annotation is float.

    Parameters
    ----------
    name
        The option, for the error.
    value
        The value.
    kind
        The annotation: ``int``, ``float``, ``bool``, ``str``, ``Path``, ``Annotated`` ones of these with
        limits, ``Literal``, unions and tuples of these. Others are not checked.

    Raises
    ------
    BadOption
        Another type, or a value beyond the limits; in one line, with the valid ones.
    """
    return _or_refuse(name, value, kind, _checked)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function, or `__init__`, whose arguments are checked by their annotations at each call.

    Its errors are those of `check`, before anything else is done.
    """
    owner = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        try:
            bound = _signature(function).bind(*args, **options)
        except TypeError:
            return function(*args, **options)  # which raises Python's own error
        for name, value in bound.arguments.items():
            parameter = bound.signature.parameters[name]
            if is_option(parameter.annotation) and value is not parameter.default:
                bound.arguments[name] = check(f"option {name!r} of {owner}", value, parameter.annotation)
        return function(*bound.args, **bound.kwargs)

    return call


def check_fields(instance: Any) -> None:
    """Check and convert the fields of a dataclass by their annotations, as `checked` does with arguments."""
    owner = type(instance)
    for name, parameter in inspect.signature(owner, eval_str=True).parameters.items():
        value = getattr(instance, name)
        if is_option(parameter.annotation) and value is not parameter.default:
            value = check(f"option {name!r} of {owner.__name__}", value, parameter.annotation)
            object.__setattr__(instance, name, value)  # it may be frozen


def field_values(instance: Any) -> dict[str, object]:
    """Return the fields of a dataclass by name; of another object none."""
    fields = dataclasses.fields(instance) if dataclasses.is_dataclass(instance) else ()
    return {field.name: getattr(instance, field.name) for field in fields}


@functools.cache
def _signature(function: Callable[..., object]) -> inspect.Signature:
    return inspect.signature(function, eval_str=True)


def convert(text: str, kind: Any) -> Any:
    """Convert text by an annotation; numbers and texts must be within its limits.

    Raises
    ------
    ValueError
        The text is no such value.
    """
    if _is_union(kind):
        return _convert_union(text, kind)
    if get_origin(kind) is tuple:
        return _convert_tuple(text, kind)
    if get_origin(kind) is Literal:
        return _choose(text, {format_value(value): value for value in get_args(kind)})
    if _base(kind) is bool:
        return _choose(text.lower(), _BOOLS)
    if not text and _base(kind) is Path:
        return _reject()  # which Path would take for the current folder
    return _checked(_base(kind)(text), kind)


def expected(kind: Any) -> str:
    """Return the valid values in words: "a whole number from 1 to 16, or none"."""
    if _is_union(kind):
        choices = [expected(member) for member in _members(kind)]
        return ", or ".join(choices + ["none"] * (types.NoneType in get_args(kind)))
    if get_origin(kind) is tuple:
        elements = _elements(kind)
        count = "one or more" if ... in get_args(kind) else str(len(elements))
        return f"{count} joined by x, each {expected(elements[0])}"
    if get_origin(kind) is Literal:
        valid = [format_value(value) or "empty" for value in get_args(kind)]
        return f"one of {', '.join(valid)}" if len(valid) > 1 else valid[0]
    if _base(kind) is bool:
        return "yes or no"
    limits = _limits(kind) if get_origin(kind) is Annotated else ()
    return " ".join(filter(None, [_NOUNS[_base(kind)], *map(str, limits)]))


def names_only(kind: Any) -> Any:
    """Return the annotation with specs of which only the names are checked, where that is another check."""
    if _is_union(kind):
        return Union[tuple(map(names_only, get_args(kind)))]  # noqa: UP007
    if get_origin(kind) is not Annotated:
        return kind
    base, *limits = get_args(kind)
    checks = [getattr(each, "check_name", None) for each in limits]
    limits = [Accepted(check) if check else each for each, check in zip(limits, checks, strict=True)]
    return Annotated[(base, *limits)]


def type_name(kind: Any) -> str:
    """Return the type in a word, or a few joined by |: "int|none", "yes|no"."""
    if _is_union(kind):
        optional = ["none"] if types.NoneType in get_args(kind) else []
        return "|".join([*map(type_name, _members(kind)), *optional])
    if get_origin(kind) is tuple:
        names = "x".join(map(type_name, _elements(kind)))
        return f"{names}x..." if ... in get_args(kind) else names
    if get_origin(kind) is Literal:
        return "|".join(map(format_value, get_args(kind)))
    return "yes|no" if _base(kind) is bool else str(_base(kind).__name__).lower()


def format_value(value: object) -> str:
    """Return a value as text that `convert` reads back."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return "x".join(map(format_value, value)) if isinstance(value, tuple) else str(value)


def _or_refuse(name: str, value: Any, kind: Any, accept: Callable[[Any, Any], Any]) -> Any:
    try:
        return accept(value, kind)
    except BadOption:
        raise  # of a spec, whose error names its own option
    except ValueError:
        raise BadOption(f"{name} has a wrong value", expected=expected(kind), got=shown(value)) from None


def _checked(value: Any, kind: Any) -> Any:
    """Return the value as one of this kind, or raise `ValueError`."""
    if _is_union(kind):
        return _check_union(value, kind)
    if get_origin(kind) is tuple:
        values = value if isinstance(value, tuple | list) else _reject()
        kinds = _kinds_of_elements(kind, len(values))
        return tuple(_checked(each, k) for each, k in zip(values, kinds, strict=True))
    if get_origin(kind) is Literal:
        valid = any(value == each and type(value) is type(each) for each in get_args(kind))
    else:
        value = _as_base(value, _base(kind))
        valid = all(limit.admits(value) for limit in _limits(kind))
    return value if valid else _reject()


def _as_base(value: Any, base: Any) -> Any:
    """Return a value of this type, without a loss; NumPy's numbers are numbers too, and bool is none."""
    if base is bool or isinstance(value, bool):
        return value if base is type(value) else _reject()
    if base is int:
        return int(value) if isinstance(value, numbers.Integral) else _reject()
    if base is float:
        try:
            return float(value) if isinstance(value, numbers.Real) else _reject()
        except OverflowError:
            return _reject()
    return value if isinstance(value, str | Path if base is Path else base) else _reject()


def _convert_union(text: str, kind: Any) -> Any:
    if types.NoneType in get_args(kind) and text.lower() == "none":
        return None
    return _first_that_fits(text, kind, convert)


def _check_union(value: Any, kind: Any) -> Any:
    opaque = any(not is_option(member) for member in get_args(kind) if member is not types.NoneType)
    plain = isinstance(value, tuple(_LIMITS))
    if (value is None and types.NoneType in get_args(kind)) or (opaque and not plain):
        return value
    return _first_that_fits(value, kind, _checked)


def _first_that_fits(value: Any, kind: Any, accept: Callable[[Any, Any], Any]) -> Any:
    for member in _members(kind):
        try:
            return accept(value, member)
        except BadOption:
            raise
        except ValueError:
            continue
    return _reject()


def _convert_tuple(text: str, kind: Any) -> tuple[Any, ...]:
    parts = text.split("x")
    return tuple(
        convert(part, k) for part, k in zip(parts, _kinds_of_elements(kind, len(parts)), strict=True)
    )


def _kinds_of_elements(kind: Any, count: int) -> tuple[Any, ...]:
    """The kind of each element of a tuple, which has at least one."""
    kinds = _elements(kind)
    return kinds * max(1, count) if ... in get_args(kind) else kinds


def _choose(text: str, choices: Mapping[str, object]) -> object:
    return choices[text] if text in choices else _reject()


def _reject() -> Any:
    raise ValueError


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union that can be written as text, except None."""
    return tuple(k for k in get_args(kind) if k is not types.NoneType and is_option(k))


def _elements(kind: Any) -> tuple[Any, ...]:
    return tuple(k for k in get_args(kind) if k is not ...)


def _base(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _limits(kind: Any) -> tuple[Limit, ...]:
    """The limits of an annotation, or else those of all values of the type."""
    if get_origin(kind) is Annotated:
        return tuple(each for each in get_args(kind)[1:] if isinstance(each, Limit))
    return _LIMITS[kind]
