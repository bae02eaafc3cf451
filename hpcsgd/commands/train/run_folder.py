"""The folder of a run: where it is, how it begins, and whether another run may go on in it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcsgd import registry
from hpcsgd.commands.train.settings import AUTO, Settings, resumed, to_toml
from hpcsgd.errors import BadOption

#: Is in the folder of a run that has come to its end: there is nothing to go on with.
DONE = "done"

#: Settings whose change would make the checkpoint's state, or its position in the data, another's.
_FIXED_FOR_A_RUN = (
    *("data", "strategy", "virtual_nodes", "compress", "optimizer"),
    *("batch", "accumulate", "alpha", "seed"),
)


def path_of(settings: Settings) -> Path:
    """Where the run goes: to the folder it resumes, or a new one by name, or by time and method.

    Raises
    ------
    BadOption
        A run shall go on if it has begun, and is not named.
    """
    if settings.resume == AUTO and not settings.name:
        raise BadOption(f"--resume {AUTO} needs to know which run", do="give its --name", everywhere=True)
    if settings.resume not in ("", AUTO):
        return resumed(settings.resume)[0]
    schemes = [settings.strategy, *([] if settings.compress == "none" else [settings.compress])]
    method = "-".join(registry.parse(scheme)[0] for scheme in schemes)
    return Path(settings.out) / (settings.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{method}")


def make(folder: Path, settings: Settings, about: dict[str, object]) -> None:
    """Make it, with the settings in its `config.toml`.

    Raises
    ------
    BadOption
        It exists, and what is in it is not to be gone on with.
    """
    try:
        # A run may have been killed before its first checkpoint.
        folder.mkdir(parents=True, exist_ok=settings.resume == AUTO)
    except FileExistsError:
        raise BadOption(
            f"{folder} exists",
            do=f"choose another --name, or go on with it: --resume {folder}",
        ) from None
    named = replace(settings, out=str(folder.parent), name=folder.name, resume="")
    (folder / "config.toml").write_text(to_toml(named, about))


def mark(folder: Path, rank: int, *, done: bool) -> None:
    """Rank 0 leaves the file `done` where the run has come to its end, and removes it while it goes on."""
    if rank == 0 and done:
        (folder / DONE).touch()
    elif rank == 0:
        (folder / DONE).unlink(missing_ok=True)


def check_unchanged(settings: Settings, before: dict[str, Any]) -> None:
    """Raise on all ranks where a setting differs that a run must keep.

    Raises
    ------
    BadOption
        Naming the first of them.
    """
    for name in _FIXED_FOR_A_RUN:
        value = getattr(settings, name)
        if value != before.get(name, value):
            raise BadOption(
                f"a run cannot go on with another {name}",
                expected=before[name],
                got=value,
                do=f"leave out --{name}, or start a new run",
                everywhere=True,
            )
