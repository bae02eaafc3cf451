"""A table with a row per group of runs that differ only in one setting, such as the seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich.markup import escape
from rich.table import Table

from hpcsgd.commands.report.labels import LOCATION_KEYS, flatten, format_value, labels
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.summary import Summary, summaries
from hpcsgd.commands.report.units import byte_unit, time_unit
from hpcsgd.errors import BadOption

_UNKNOWN = "—"


def grouped(runs: Sequence[RunRecord], over: str) -> Table:
    """The summary of groups of runs that differ in the setting `over` alone, by their first members.

    Raises
    ------
    BadOption
        No run has this setting.
    """
    if not any(over in flatten(run.config) for run in runs):
        known = sorted({key for run in runs for key in flatten(run.config)})
        raise BadOption(f"no run has a setting {over!r}", do="give --over one of: " + ", ".join(known))
    members: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for index, run in enumerate(runs):
        members.setdefault(_group_key(run.config, over), []).append(index)
    rows = summaries(runs)
    groups = [[rows[index] for index in indices] for indices in members.values()]
    names = labels([runs[indices[0]] for indices in members.values()])
    time = time_unit(max(row.time for row in rows))
    size = byte_unit(max(row.bytes_per_rank for row in rows))
    columns: dict[str, Callable[[Summary], float | None]] = {
        "Final accuracy\n(%)": lambda row: _scaled(row.final_accuracy, 100),
        "Best accuracy\n(%)": lambda row: _scaled(row.best_accuracy, 100),
        "Final loss": lambda row: row.final_loss,
        f"Time\n({time.symbol})": lambda row: row.time / time.size,
        f"Bytes per rank\n({size.symbol})": lambda row: row.bytes_per_rank / size.size,
        "Compression\n(÷)": lambda row: row.compression,
    }
    table = Table(caption=f"mean ± standard deviation over {over}", caption_justify="left")
    for name in ("Run", "Runs", *columns):
        table.add_column(name, justify="left" if name == "Run" else "right", overflow="fold")
    for name, group in zip(names, groups, strict=True):
        cells = [_mean_and_deviation([value(row) for row in group]) for value in columns.values()]
        table.add_row(escape(name), str(len(group)), *cells)
    return table


def _group_key(config: Mapping[str, Any], over: str) -> tuple[tuple[str, str], ...]:
    ignored = (*LOCATION_KEYS, over)
    items = ((key, format_value(value)) for key, value in flatten(config).items() if key not in ignored)
    return tuple(sorted(items))


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


def _mean_and_deviation(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return _UNKNOWN
    return f"{fmean(known):.4g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")
