"""Names of runs in a comparison: by what tells them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hpcsgd.commands.report.records import RunRecord

LONGEST = 40
WHERE = ("name", "out", "resume")  # where a run's files are says nothing of what it did
_SPEAKS_FOR_ITSELF = ("strategy", "compress", "model", "data")


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Name each run by the settings in which it differs from the others.

    Where no setting differs, or too many do for a short name, the folders' names serve; runs that
    still have the same name get their folder's name beside it.
    """
    keys = differences(runs)
    names = [_name(flat(run.config), keys) for run in runs]
    folders = _folders(runs)
    if not keys or max(map(len, names)) > LONGEST:
        return folders
    times = Counter(names)
    return [
        name if name and times[name] == 1 else f"{name} ({folder})".strip()
        for name, folder in zip(names, folders, strict=True)
    ]


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """The settings in which runs differ, the method, model and data first."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys([*_SPEAKS_FOR_ITSELF, *(key for config in configs for key in config)])
    told = [key for key in keys if key not in WHERE]
    return [key for key in told if len({written(config.get(key)) for config in configs}) > 1]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings in tables of tables as one table with dotted keys."""
    table: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping)
        table.update(flat(value, f"{prefix}{key}.") if inner else {prefix + key: value})
    return table


def written(value: object) -> str:
    """A setting's value as the file would say it, strings without their quotes."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    parts = []
    for key in keys:
        if key in config:
            value = written(config[key])
            parts.append(value if key in _SPEAKS_FOR_ITSELF else f"{key.split('.')[-1]}={value}")
    return ", ".join(parts)


def _folders(runs: Sequence[RunRecord]) -> list[str]:
    names: list[str] = []
    for depth in range(1, 1 + max(len(run.folder.parts) for run in runs)):
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            break
    return names
