"""Specs, ``NAME:key=value,key=value``: text that names an entry of a registry and sets its options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from hpcsgd.errors import BadOption, HpcsgdError, shown, unknown
from hpcsgd.registry.values import format_value, is_option, read, type_name

T = TypeVar("T")
Parameters = dict[str, inspect.Parameter]


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

    Each value is converted by the annotation of the entry's parameter, and checked by its limits: ``int``,
    ``float``, ``bool`` (true, yes, 1, false, no, 0), ``str``, ``Path``, ``Annotated[int, Within(1, 16)]``,
    ``Literal[...]``, ``X | None`` (``none``), and tuples of these, written with ``x`` between the elements:
    ``3x32x32``. Annotations must be resolvable at run time. Parameters of other types come from ``context``
    or have a default.

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
        Unknown name or option, a value that cannot be converted or is beyond its limits, or that the entry
        rejects (``ValueError``), a missing option, or an option that ``context`` sets.
    """
    entry, arguments = bind(registry, spec, kind, **context)
    try:
        return entry(**arguments)
    except HpcsgdError:
        raise
    except (ValueError, OverflowError, MemoryError) as error:
        entry_name = f"{kind} {_name(spec)!r}"
        raise BadOption(f"{entry_name} refuses its options", expected=error, got=shown(spec)) from error


def bind(
    registry: Mapping[str, Callable[..., T]], spec: str, kind: str, **context: object
) -> tuple[Callable[..., T], dict[str, Any]]:
    """Return the registry entry that a spec names, and its arguments, without a call: see `build`."""
    name = check_name(registry, spec, kind)
    parameters = _parameters(registry[name])
    settable = _settable(parameters, context)
    entry_name = f"{kind} {name!r}"
    valid = "valid options: " + (", ".join(map(_signature, settable.values())) or "none")
    arguments = {key: value for key, value in context.items() if key in parameters}
    for key, text in _options(spec, valid).items():
        if key in context:
            raise BadOption(f"{entry_name}: option {key!r} is set by hpcsgd, and cannot be given", do=valid)
        if key not in settable:
            raise BadOption(f"{entry_name} has no option {key!r}", do=valid)
        arguments[key] = read(f"option {key!r} of {entry_name}", text, settable[key].annotation)
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise BadOption(f"{entry_name} needs option {', '.join(map(repr, missing))}", do=valid)
    return registry[name], arguments


def check_name(registry: Collection[str], spec: str, kind: str) -> str:
    """Return the name in a spec; raise `BadOption` if it is none of the registry, as `build` does."""
    name = _name(spec)
    if name not in registry:
        raise unknown(kind, name, registry)
    return name


def limited(function: Callable[..., T], **kinds: Any) -> Callable[..., T]:
    """Return a callable of another package as a registry row, with annotations that have limits.

    Parameters
    ----------
    function
        The callable.
    kinds
        Annotations by parameter.
    """

    @functools.wraps(function)
    def row(*args: Any, **options: Any) -> T:
        return function(*args, **options)

    signature = inspect.signature(function, eval_str=True)
    parameters = signature.parameters.values()
    replaced = [p.replace(annotation=kinds.get(p.name, p.annotation)) for p in parameters]
    row.__signature__ = signature.replace(parameters=replaced)  # type: ignore[attr-defined]
    return row


def format_spec(name: str, options: Mapping[str, object]) -> str:
    """Return the spec from which `build` reads these options."""
    written = ",".join(f"{key}={format_value(value)}" for key, value in options.items())
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
        what = "the name before the options is missing"
        raise BadOption(what, expected="NAME:key=value,key=value", got=shown(spec))
    return name


def _options(spec: str, remedy: str) -> dict[str, str]:
    _, colon, text = spec.partition(":")
    options: dict[str, str] = {}
    for piece in text.split(",") if colon else ():
        key, equals, value = (part.strip() for part in piece.partition("="))
        if not key or not equals:
            failure = f"cannot read option {piece!r}"
            raise BadOption(failure, expected="key=value", got=shown(spec), do=remedy)
        if key in options:
            raise BadOption(f"option {key!r} is given twice", got=shown(spec), do=remedy)
        options[key] = value
    return options


def _parameters(entry: Callable[..., object]) -> Parameters:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(entry, eval_str=True).parameters
    return {key: p for key, p in found.items() if p.kind in by_name}


def _settable(parameters: Parameters, hidden: Collection[str]) -> Parameters:
    return {key: p for key, p in parameters.items() if key not in hidden and is_option(p.annotation)}


def _example(parameter: inspect.Parameter) -> str:
    required = parameter.default is parameter.empty
    value = type_name(parameter.annotation).upper() if required else format_value(parameter.default)
    return f"{parameter.name}={value}"


def _signature(parameter: inspect.Parameter) -> str:
    name = f"{parameter.name}={type_name(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{name} (required)"
    return f"{name} (default {format_value(parameter.default) or 'empty'})"
