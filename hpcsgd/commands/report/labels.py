"""Labels of runs in a comparison, made of the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hpcsgd.commands.report.records import RunRecord

MAX_LENGTH = 40
#: Locations of the files of a run, and its id, which do not affect its results.
LOCATION_KEYS = ("name", "out", "resume", "spare", "world.run")
_KEYLESS = ("strategy", "compress", "model", "data")  # their values need no key in a label


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Label each run by the settings in which it differs from the others.

    If no setting differs, or the labels would be too long, the names of the folders are used. Runs with equal
    labels have the folder's name added in parentheses.
    """
    keys = differences(runs)
    names = [_name(flatten(run.config), keys) for run in runs]
    folders = _folders(runs)
    if not keys or max(map(len, names)) > MAX_LENGTH:
        return folders
    counts = Counter(names)
    return [
        name if name and counts[name] == 1 else f"{name} ({folder})".strip()
        for name, folder in zip(names, folders, strict=True)
    ]


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """The settings in which runs differ; strategy, compression, model and data come first."""
    configs = [flatten(run.config) for run in runs]
    keys = dict.fromkeys([*_KEYLESS, *(key for config in configs for key in config)])
    return [
        key
        for key in keys
        if key not in LOCATION_KEYS and len({format_value(config.get(key)) for config in configs}) > 1
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables of settings into one table with dotted keys."""
    table: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping)
        table.update(flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value})
    return table


def format_value(value: object) -> str:
    """A setting's value as in the TOML file, strings without quotes."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    parts = []
    for key in keys:
        if key in config:
            value = format_value(config[key])
            parts.append(value if key in _KEYLESS else f"{key.split('.')[-1]}={value}")
    return ", ".join(parts)


def _folders(runs: Sequence[RunRecord]) -> list[str]:
    names: list[str] = []
    for depth in range(1, 1 + max(len(run.folder.parts) for run in runs)):
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            break
    return names
