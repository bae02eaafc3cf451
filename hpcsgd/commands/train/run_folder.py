"""The folder of a run: its path, its creation, and the check of settings on resume."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcsgd import registry
from hpcsgd.commands.train.settings import AUTO, Settings, parse_resume, to_toml
from hpcsgd.errors import BadOption, os_errors
from hpcsgd.mpi import launcher

#: The settings of a run; its checkpoints; and the mark of a finished run.
CONFIG, CHECKPOINTS, DONE = "config.toml", "checkpoints", "done"

#: Settings that must not change on resume: the state of a checkpoint, or its position, depend on them.
_FIXED_FOR_A_RUN = (
    *("data", "strategy", "virtual_nodes", "compress", "optimizer"),
    *("batch", "accumulate", "alpha", "seed"),
)


def path_of(settings: Settings) -> Path:
    """Return the folder of the run: that of the resumed run, or a new one by name, or by time and method.

    Raises
    ------
    BadOption
        `--resume auto` without `--name`.
    """
    check_named(settings)
    if settings.resume not in ("", AUTO):
        return parse_resume(settings.resume)[0]
    schemes = [settings.strategy, *([] if settings.compress == "none" else [settings.compress])]
    method = "-".join(registry.parse(scheme)[0] for scheme in schemes)
    return Path(settings.out) / (settings.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{method}")


def check_named(settings: Settings) -> None:
    """Raise `BadOption` for `--resume auto` without `--name`."""
    if settings.resume == AUTO and not settings.name:
        raise BadOption(f"--resume {AUTO} needs the name of the run", do="give --name NAME", everywhere=True)


def check_absent(settings: Settings) -> None:
    """Raise `BadOption` on all ranks if the folder of a new run with a name exists, as `claim` would later.

    On several machines, which may see other folders, that is left to `claim`, as is a path that cannot be.
    """
    folder = Path(settings.out) / settings.name
    if settings.name and not settings.resume and launcher.is_on_one_machine() and os.path.exists(folder):
        raise _exists(folder, everywhere=True)


def claim(folder: Path, settings: Settings) -> None:
    """Create the folder of a new run, or check that the folder of a resumed run is there.

    Raises
    ------
    BadOption
        The folder exists and the run does not resume it, or the reverse.
    HpcsgdError
        The folder cannot be created.
    """
    if settings.resume not in ("", AUTO):
        if not folder.is_dir():
            raise BadOption(f"there is no run to resume in {folder}", do="give --resume the folder of a run")
        return
    do = "free space there, or create it elsewhere: --out FOLDER"
    with os_errors(f"cannot create the run's folder {folder}", do=do):
        try:
            # With --resume auto a run may have been killed before its first checkpoint.
            folder.mkdir(parents=True, exist_ok=settings.resume == AUTO)
        except FileExistsError:
            raise _exists(folder) from None


def _exists(folder: Path, *, everywhere: bool = False) -> BadOption:
    do = f"choose another --name, or continue that run: --resume {folder}"
    return BadOption(f"{folder} exists", do=do, everywhere=everywhere)


def release(folder: Path) -> None:
    """Remove the folder of a run that has ended before it wrote anything."""
    with suppress(OSError):
        folder.rmdir()


def config(folder: Path, settings: Settings, world: dict[str, object]) -> str:
    """Return the text of `config.toml`; its table `[world]` is for the reader's information."""
    named = replace(settings, out=str(folder.parent), name=folder.name, resume="")
    return to_toml(named, world)


def mark(folder: Path, *, done: bool) -> None:
    """Create the file `done` at the end of the run, or remove it when the run continues."""
    if done:
        (folder / DONE).touch()
    else:
        (folder / DONE).unlink(missing_ok=True)


def check_unchanged(settings: Settings, before: dict[str, Any]) -> None:
    """Check that a resumed run has the data, method and seed of the settings in its checkpoint, `before`.

    Raises
    ------
    BadOption
        On all ranks; names the first setting that differs.
    """
    for name in _FIXED_FOR_A_RUN:
        value = getattr(settings, name)
        if value != before.get(name, value):
            raise BadOption(
                f"a run cannot be resumed with another {name}",
                expected=before[name],
                got=value,
                do=f"leave out --{name.replace('_', '-')}, or start a new run",
                everywhere=True,
            )
