"""Labels of runs in a comparison, made of the settings in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

from hpcsgd import registry
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.words import in_words, setting_in_words
from hpcsgd.commands.train.settings import default_model
from hpcsgd.errors import BadOption

MAX_LENGTH = 60
#: Locations of the files of a run, and its id, which do not affect its results.
LOCATION_KEYS = ("name", "out", "resume", "spare", "world.run")
_KEYLESS = ("strategy", "compress", "data", "model")  # their values need no key in a label


def labels(runs: Sequence[RunRecord]) -> list[str]:
    """Label each run, in words, by the settings in which it differs from the others.

    A value that more than half of the runs have is left out, but for strategy, compression, data and model. A
    label with as many settings as it has room for, and labels that are equal, have the folder's name added in
    parentheses; where no setting differs, it is the label. If the runs are of several tasks, each is compared
    to those of its own, which is named at the end.
    """
    found = zip(curve_labels(runs), map(task, runs), strict=True)
    several = len(set(map(task, runs))) > 1
    return [f"{label} · {its}" if several else label for label, its in found]


def curve_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Label the curve of each run among those of its task, with the strategy if there are several tasks.

    Curves of different tasks are on different axes, so they may have equal labels.
    """
    tasks = [task(run) for run in runs]
    if len(set(tasks)) == 1:
        return _labels(runs, differences(runs))
    found = {}
    for each in dict.fromkeys(tasks):
        members = [run for run, its in zip(runs, tasks, strict=True) if its == each]
        keys = dict.fromkeys(["strategy", "compress", *differences(members)])
        found[each] = iter(_labels(members, list(keys)))
    return [next(found[each]) for each in tasks]


def task(run: RunRecord) -> str:
    """The data set and the kind of model, in words; the metrics of different tasks are not comparable."""
    config = settings(run)
    model = str(config.get("model", ""))
    with suppress(BadOption):
        model, _ = registry.parse(model)
    return " · ".join(filter(None, map(in_words, (str(config.get("data", "")), model))))


def is_baseline(run: RunRecord) -> bool:
    """Whether a run is one of plain all-reduce, which other methods are compared to."""
    config = settings(run)
    return config.get("strategy") == "allreduce" and config.get("compress", "none") == "none"


def differences(runs: Sequence[RunRecord]) -> list[str]:
    """The settings in which runs differ; strategy, compression, data and model come first."""
    configs = [settings(run) for run in runs]
    keys = dict.fromkeys([*_KEYLESS, *(key for config in configs for key in config)])
    return [
        key
        for key in keys
        if key not in LOCATION_KEYS and len({format_value(config.get(key)) for config in configs}) > 1
    ]


def settings(run: RunRecord) -> dict[str, Any]:
    """The settings of a run, flattened, with the name of the model that an empty one stands for."""
    config = flatten(run.config)
    if config.get("model") == "":
        with suppress(BadOption):
            config["model"] = default_model(str(config.get("data")))
    return config


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


def _labels(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[str]:
    configs = [{key: format_value(value) for key, value in settings(run).items()} for run in runs]
    parts = [list(_parts(config, keys, configs)) for config in configs]
    fitting = [_fitting(each) for each in parts]
    counts = Counter(map(tuple, fitting))
    names = []
    for some, each, folder in zip(fitting, parts, _folders(runs), strict=True):
        beside = f" ({folder})" if some != each or counts[tuple(some)] > 1 else ""
        names.append(", ".join(some) + beside if some else folder)
    return names


def _parts(
    config: Mapping[str, str], keys: Sequence[str], configs: Sequence[Mapping[str, str]]
) -> Iterator[str]:
    """The settings of a run, in words, without those that are usual."""
    for key in keys:
        value = config.get(key, "")
        if not value or (key == "compress" and value == "none" and "strategy" in keys):
            continue
        if key in _KEYLESS and value != "none":
            yield in_words(value)
        elif key in _KEYLESS or 2 * sum(other.get(key) == value for other in configs) <= len(configs):
            yield setting_in_words("compression" if key == "compress" else key, value)


def _fitting(parts: Sequence[str]) -> list[str]:
    lengths = accumulate(len(part) + len(", ") for part in parts)
    return [part for part, length in zip(parts, lengths, strict=True) if length - len(", ") <= MAX_LENGTH]


def _folders(runs: Sequence[RunRecord]) -> list[str]:
    names: list[str] = []
    for depth in range(1, 1 + max(len(run.folder.parts) for run in runs)):
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            break
    return names
