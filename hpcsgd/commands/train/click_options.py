"""The options of ``hpcsgd train``, and its start: what needs no torch is done before torch is imported."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hpcsgd import registry
from hpcsgd.commands import options
from hpcsgd.commands.train import run_folder, sweep
from hpcsgd.commands.train.settings import (
    AUTO,
    FIELDS,
    KINDS,
    Settings,
    default_model,
    from_toml,
    merge,
    parse_resume,
    validate,
)
from hpcsgd.errors import BadOption
from hpcsgd.mpi import launcher
from hpcsgd.training import data, models

R = TypeVar("R")

#: The annotation of each setting, with specs of which only the names are checked.
_KINDS_WITHOUT_TORCH = {name: registry.names_only(kind) for name, kind in KINDS.items()}


def click_options(function: Callable[..., R]) -> Callable[..., R]:
    """Add one option per setting, ``--config FILE`` and ``--element N`` to a click command.

    The function gets the checked settings as its argument ``settings``. The command line takes precedence
    over the file; a resumed run uses its own file. Files and the command line raise the same errors.
    """

    @functools.wraps(function)
    def with_settings(*args: Any, config: Path | None, element: int | None, **values: Any) -> R:
        given = {name: text for name in FIELDS if (text := values.pop(name)) is not None}
        if not config and given.get("resume", "") not in ("", AUTO):
            config = parse_resume(given["resume"])[0] / "config.toml"
        if not config and element is not None:
            raise BadOption("--element needs a sweep", do="name the file of the sweep: --config FILE")
        file = from_toml(config, element) if config else {}
        settings = merge(file, {name: _parsed(name, text) for name, text in given.items()})
        _check_without_torch(settings)
        _announce(settings)
        _import_torch()
        return function(*args, settings=validate(settings), **values)

    for name in reversed(FIELDS):
        flag = "--" + name.replace("_", "-")
        kind = registry.type_name(KINDS[name]).removesuffix("|none")
        metavar = kind.upper() if kind in ("int", "float") else "TEXT"
        with_settings = click.option(flag, name, metavar=metavar, help=_help(name))(with_settings)
    about = "Number of the run, from 0, in a sweep: a --config file with tables [[run]]."
    element = options.option("--element", sweep.Element, about, metavar="INT")
    about = "TOML file of settings, such as the config.toml of an earlier run."
    return options.option("--config", Path, about, metavar="FILE")(element(with_settings))


def _parsed(name: str, text: str) -> object:
    """Return the value of a text, or the text for the error of the check."""
    try:
        return registry.convert(text, _KINDS_WITHOUT_TORCH[name])
    except ValueError:
        return text


def _check_without_torch(settings: Settings) -> None:
    """Check the settings, but for the options inside of specs."""
    for name, kind in _KINDS_WITHOUT_TORCH.items():
        registry.check(f"option {name!r}", getattr(settings, name), kind)
    is_text = registry.parse(settings.data)[0] in data.LANGUAGE_DATASETS
    models.check_fits(
        settings.model or default_model(settings.data), "language" if is_text else "classification"
    )
    run_folder.check_named(settings)
    run_folder.check_absent(settings)


def _announce(settings: Settings) -> None:
    """Show that the command has begun: the import of torch takes seconds on a busy node."""
    if launcher.rank() or settings.progress == "off":
        return
    ranks = max(1, launcher.size()[1])
    folder = Path(settings.out) / settings.name
    if settings.resume not in ("", AUTO):
        folder = parse_resume(settings.resume)[0]
    with contextlib.suppress(OSError):
        print(f"{ranks} rank{'s' * (ranks > 1)}, run in {folder}: importing torch", flush=True)


def _import_torch() -> None:
    """Import torch without garbage collection, which finds nothing then; later ones leave its modules out."""
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def _help(name: str) -> str:
    about: Any = FIELDS[name].metadata
    default: Any = FIELDS[name].default
    shown = {None: "none", "": "empty"}.get(default, default)
    facts = [f"in {about['unit']}"] if about["unit"] else []
    if registry.type_name(KINDS[name]) not in ("str", "|str"):
        facts.append(registry.expected(KINDS[name]))
    return f"{about['help']}  [{'; '.join([*facts, f'default: {shown}'])}]"
