"""Specs, ``NAME:key=value,key=value``: text that names an entry of a registry and sets its options."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from hpcsgd.errors import BadOption, HpcsgdError, unknown

T = TypeVar("T")
Parameters = dict[str, inspect.Parameter]

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_SCALARS = (bool, int, float, str, Path)


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """Split a spec into its name and its options, without conversion.

    Parameters
    ----------
    spec
        ``NAME`` or ``NAME:key=value,key=value``. A value may contain ``:``, ``=`` and ``/``,
        but no comma; spaces around names and values are dropped.

    Raises
    ------
    BadOption
        Empty name or key, an option without ``=``, or a key given twice.
    """
    return _name(spec), _options(spec, "write NAME:key=value,key=value")


def build(registry: Mapping[str, Callable[..., T]], spec: str, kind: str, **context: object) -> T:
    """Call the registry entry that a spec names, with the spec's options.

    Each value is converted by the annotation of the entry's parameter: ``int``, ``float``, ``bool``
    (true, yes, 1, false, no, 0), ``str``, ``Path``, ``Literal[...]``, ``X | None`` (``none``), and
    tuples of these, written with ``x`` between the elements: ``3x32x32``. Annotations must be
    resolvable at run time. Parameters of other types come from ``context`` or have a default.

    Parameters
    ----------
    registry
        Callables by name.
    spec
        ``NAME:key=value,key=value``.
    kind
        The kind of the entries, for errors: ``"strategy"``.
    context
        Values that the caller sets; each entry receives those for which it has a parameter.

    Raises
    ------
    BadOption
        Unknown name or option, a value that cannot be converted or that the entry rejects
        (``ValueError``), a missing option, or an option that ``context`` sets; lists the valid options.
    """
    name = _name(spec)
    if name not in registry:
        raise unknown(kind, name, registry)
    entry = registry[name]
    parameters = _parameters(entry)
    settable = _settable(parameters, context)
    entry_name = f"{kind} {name!r}"
    valid = "valid options: " + (", ".join(map(_signature, settable.values())) or "none")
    arguments = {key: value for key, value in context.items() if key in parameters}
    for key, text in _options(spec, valid).items():
        if key in context:
            raise BadOption(f"{entry_name}: option {key!r} is set by hpcsgd, and cannot be given", do=valid)
        if key not in settable:
            raise BadOption(f"{entry_name} has no option {key!r}", do=valid)
        kind_of_value = settable[key].annotation
        try:
            arguments[key] = _convert(text, kind_of_value)
        except ValueError:
            failure = f"{entry_name}: option {key!r} has a value of the wrong type"
            expected = _type_name(kind_of_value)
            raise BadOption(failure, expected=expected, got=repr(text), do=valid) from None
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise BadOption(f"{entry_name} needs option {', '.join(map(repr, missing))}", do=valid)
    try:
        return entry(**arguments)
    except HpcsgdError:
        raise
    except ValueError as error:
        raise BadOption(f"{entry_name}: {error}", got=spec, do=valid) from error


def format_spec(name: str, options: Mapping[str, object]) -> str:
    """Return the spec from which `build` reads these options."""
    written = ",".join(f"{key}={_format(value)}" for key, value in options.items())
    return f"{name}:{written}" if written else name


def describe(
    registry: Mapping[str, Callable[..., object]], hidden: Collection[str] = ()
) -> list[tuple[str, str, str]]:
    """Describe the entries of a registry for ``--help``.

    Parameters
    ----------
    registry
        Callables by name.
    hidden
        Parameters that are not options, because the caller of `build` passes them as context.

    Returns
    -------
    list of (name, options, summary)
        In the order of the registry. Options as in a spec, with their defaults (``period=8``) or, where
        required, their type (``period=INT``); the summary is the docstring's first line.
    """
    rows = []
    for name, entry in registry.items():
        options = ",".join(map(_example, _settable(_parameters(entry), hidden).values()))
        rows.append((name, options, (inspect.getdoc(entry) or "").partition("\n")[0]))
    return rows


def _name(spec: str) -> str:
    name = spec.partition(":")[0].strip()
    if not name:
        raise BadOption(
            "the name before the options is missing", expected="NAME:key=value,key=value", got=repr(spec)
        )
    return name


def _options(spec: str, remedy: str) -> dict[str, str]:
    _, colon, text = spec.partition(":")
    options: dict[str, str] = {}
    for piece in text.split(",") if colon else ():
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not key or not equals:
            failure = f"cannot read option {piece!r}"
            raise BadOption(failure, expected="key=value", got=repr(spec), do=remedy)
        if key in options:
            raise BadOption(f"option {key!r} is given twice", got=repr(spec), do=remedy)
        options[key] = value
    return options


def _parameters(entry: Callable[..., object]) -> Parameters:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(entry, eval_str=True).parameters
    return {key: p for key, p in found.items() if p.kind in by_name}


def _settable(parameters: Parameters, hidden: Collection[str]) -> Parameters:
    return {key: p for key, p in parameters.items() if key not in hidden and _is_convertible(p.annotation)}


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union that can be written as text, except None."""
    return tuple(k for k in get_args(kind) if k is not types.NoneType and _is_convertible(k))


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _elements(kind: Any) -> tuple[Any, ...]:
    return tuple(k for k in get_args(kind) if k is not ...)


def _is_convertible(kind: Any) -> bool:
    if _is_union(kind):
        return bool(_members(kind))
    if get_origin(kind) is tuple:
        return all(map(_is_convertible, _elements(kind)))
    return kind in _SCALARS or get_origin(kind) is Literal


def _convert(text: str, kind: Any) -> Any:
    if _is_union(kind):
        return _convert_union(text, kind)
    if get_origin(kind) is tuple:
        return _convert_tuple(text, kind)
    if get_origin(kind) is Literal:
        return _choose(text, {_format(value): value for value in get_args(kind)})
    if kind is bool:
        return _choose(text.lower(), _BOOLS)
    value = kind(text)
    return _reject(text) if kind is float and math.isnan(value) else value


def _convert_union(text: str, kind: Any) -> Any:
    if types.NoneType in get_args(kind) and text.lower() == "none":
        return None
    for member in _members(kind):
        try:
            return _convert(text, member)
        except ValueError:
            continue
    return _reject(text)


def _convert_tuple(text: str, kind: Any) -> tuple[Any, ...]:
    kinds, parts = _elements(kind), text.split("x")
    if ... in get_args(kind):
        kinds = kinds * len(parts)
    return tuple(_convert(part, k) for part, k in zip(parts, kinds, strict=True))


def _choose(text: str, choices: Mapping[str, object]) -> object:
    return choices[text] if text in choices else _reject(text)


def _reject(text: str) -> Any:
    raise ValueError(text)


def _format(value: object) -> str:
    """A value as text that `_convert` reads back."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return "x".join(map(_format, value)) if isinstance(value, tuple) else str(value)


def _type_name(kind: Any) -> str:
    if _is_union(kind):
        optional = ["none"] if types.NoneType in get_args(kind) else []
        return "|".join([*map(_type_name, _members(kind)), *optional])
    if get_origin(kind) is tuple:
        names = "x".join(map(_type_name, _elements(kind)))
        return f"{names}x..." if ... in get_args(kind) else names
    if get_origin(kind) is Literal:
        return "|".join(map(_format, get_args(kind)))
    return "yes|no" if kind is bool else str(kind.__name__).lower()


def _example(parameter: inspect.Parameter) -> str:
    required = parameter.default is parameter.empty
    value = _type_name(parameter.annotation).upper() if required else _format(parameter.default)
    return f"{parameter.name}={value}"


def _signature(parameter: inspect.Parameter) -> str:
    name = f"{parameter.name}={_type_name(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{name} (required)"
    return f"{name} (default {_format(parameter.default) or 'empty'})"
