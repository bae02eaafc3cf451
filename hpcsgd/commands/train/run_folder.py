"""The folder of a run: its path, its creation, and the check of settings on resume."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcsgd import registry
from hpcsgd.commands.train.settings import AUTO, Settings, parse_resume, to_toml
from hpcsgd.errors import BadOption

#: File in the folder of a finished run.
DONE = "done"

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
    if settings.resume == AUTO and not settings.name:
        raise BadOption(f"--resume {AUTO} needs the name of the run", do="give --name NAME", everywhere=True)
    if settings.resume not in ("", AUTO):
        return parse_resume(settings.resume)[0]
    schemes = [settings.strategy, *([] if settings.compress == "none" else [settings.compress])]
    method = "-".join(registry.parse(scheme)[0] for scheme in schemes)
    return Path(settings.out) / (settings.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{method}")


def create(folder: Path, settings: Settings, world: dict[str, object]) -> None:
    """Create the folder, and write its `config.toml`.

    Parameters
    ----------
    folder
        The run's folder.
    settings
        Settings of the run.
    world
        Contents of the ``[world]`` table, for the reader's information.

    Raises
    ------
    BadOption
        The folder exists, and the run does not resume it.
    """
    try:
        # With --resume auto a run may have been killed before its first checkpoint.
        folder.mkdir(parents=True, exist_ok=settings.resume == AUTO)
    except FileExistsError:
        raise BadOption(
            f"{folder} exists",
            do=f"choose another --name, or continue that run: --resume {folder}",
        ) from None
    named = replace(settings, out=str(folder.parent), name=folder.name, resume="")
    (folder / "config.toml").write_text(to_toml(named, world))


def mark(folder: Path, rank: int, *, done: bool) -> None:
    """Let rank 0 create the file `done` at the end of the run, or remove it when the run continues."""
    if rank == 0 and done:
        (folder / DONE).touch()
    elif rank == 0:
        (folder / DONE).unlink(missing_ok=True)


def check_unchanged(settings: Settings, before: dict[str, Any]) -> None:
    """Check that a resumed run has the same data, method and seed as before.

    Parameters
    ----------
    settings
        Settings of the resumed run.
    before
        Settings in the checkpoint, by name.

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
