"""Charts of runs: accuracy and losses against time, epochs and bytes, and the time per step of each rank.

Runs of one task share axes, see `hpcsgd.commands.report.labels.task`; each task has charts of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpcsgd.commands.report.curves import Curve, draw_curves, spans_decades, vertical
from hpcsgd.commands.report.figures import INK, Chart, Dashes, Panel, PanelPosition, draw, line_styles, style
from hpcsgd.commands.report.labels import curve_labels, is_baseline, task
from hpcsgd.commands.report.records import Columns, Floats, RunRecord
from hpcsgd.commands.report.summary import moved_bytes, uses_mostly_shared_memory
from hpcsgd.commands.report.units import byte_unit, significant, time_unit

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Opacity of the bars of waiting, above those of computing.
_PALE = 0.35
_MAX_SEPARATE_BARS = 24
_MAX_POINTS = 60  # of a curve of training, whose records may be many, and vary


@dataclass(frozen=True)
class Line:
    """A run in the charts of its task: its label, and the style of its curves."""

    run: RunRecord
    label: str
    color: str
    dashes: Dashes


@dataclass(frozen=True)
class Section:
    """The charts of one task."""

    title: str  # the task, in words
    lines: Sequence[Line]  # its runs, the baseline first
    curves: Sequence[Chart]  # a chart for each metric
    #: The time per step on each rank, with a panel for each run; None if no run has records of it.
    ranks: Chart | None


@dataclass(frozen=True)
class _Metric:
    """A vertical axis: file name, title, label, columns and values, whether its scale may be logarithmic."""

    name: str
    title: str
    label: str
    columns: Callable[[RunRecord], Columns]
    values: Callable[[Columns], Floats]
    format_value: Callable[[float], str]
    may_be_log: bool


def _accuracy(columns: Columns) -> Floats:
    return 100 * columns.accuracy


def _loss(columns: Columns) -> Floats:
    return columns.loss


def _tested(run: RunRecord) -> Columns:
    return run.test


def _trained(run: RunRecord) -> Columns:
    """The training records; where they are many, the mean loss of consecutive ones, at the last of these."""
    train = run.train
    if len(train) <= _MAX_POINTS:
        return train
    parts = np.array_split(np.arange(len(train)), _MAX_POINTS)
    ends = [part[-1] for part in parts]
    with np.errstate(invalid="ignore"):  # infinities of both signs
        loss = np.array([train.loss[part].mean() for part in parts])
    last = {field.name: getattr(train, field.name)[ends] for field in fields(train)}
    return replace(train, **last | {"loss": loss})


_THREE_DIGITS = partial(significant, digits=3)
_METRICS = (
    _Metric("accuracy", "Test accuracy", "test accuracy (%)", _tested, _accuracy, "{:.2f}".format, False),
    _Metric("loss", "Test loss", "test loss", _tested, _loss, _THREE_DIGITS, True),
    _Metric("training-loss", "Training loss", "training loss", _trained, _loss, _THREE_DIGITS, True),
)


@dataclass(frozen=True)
class _Cost:
    """A horizontal axis: its label, its largest value, and the coordinates of a run's records."""

    label: str
    most: float
    values: Callable[[RunRecord, Columns], Floats]


def figures(runs: Sequence[RunRecord]) -> list[Figure]:
    """Draw the figures of runs; the label of a figure is the name of its file.

    Raises
    ------
    HpcsgdError
        matplotlib is not installed.
    """
    drawn = []
    parts = sections(runs)
    for index, section in enumerate(parts):
        # A number, because titles may be alike in the letters that names of files can have.
        suffix = f"-{index + 1}-{_slug(section.title)}" if len(parts) > 1 else ""
        for chart in (*section.curves, *([section.ranks] if section.ranks else [])):
            figure = draw(chart)
            figure.set_label(chart.name + suffix)
            drawn.append(figure)
    return drawn


def sections(runs: Sequence[RunRecord]) -> list[Section]:
    """The charts of runs, for each task in the order of its first run."""
    names, tasks = curve_labels(runs), [task(run) for run in runs]
    styles = line_styles(names, {name for run, name in zip(runs, names, strict=True) if is_baseline(run)})
    order = list(styles)
    found: dict[str, list[Line]] = {each: [] for each in tasks}
    for run, name, title in zip(runs, names, tasks, strict=True):
        found[title].append(Line(run, name, *styles[name]))
    with style():
        return [
            _section(title, sorted(lines, key=lambda line: order.index(line.label)))
            for title, lines in found.items()
        ]


def _section(title: str, lines: Sequence[Line]) -> Section:
    from matplotlib.lines import Line2D

    legend = [(Line2D([], [], color=line.color, linestyle=line.dashes), line.label) for line in lines]
    costs = _costs([line.run for line in lines])
    charts = (_curves_chart(metric, costs, lines, legend) for metric in _METRICS)
    return Section(title, lines, [chart for chart in charts if chart], _ranks_chart(lines))


def _curves_chart(
    metric: _Metric, costs: Sequence[_Cost], lines: Sequence[Line], legend: Sequence[tuple[Artist, str]]
) -> Chart | None:
    columns = [metric.columns(line.run) for line in lines]
    if not any(map(len, columns)):
        return None
    values = [metric.values(each) for each in columns]
    log = metric.may_be_log and spans_decades(values)
    panels: list[Panel] = []
    for cost in costs:
        curves = [
            Curve(cost.values(line.run, each), y, line.color, line.dashes)
            for line, each, y in zip(lines, columns, values, strict=True)
        ]
        draw_panel = partial(draw_curves, xlabel=cost.label, ylabel=metric.label, curves=curves, log=log)
        panels.append(partial(draw_panel, right=cost.most, format_value=metric.format_value))
    return Chart(metric.name, metric.title, panels, legend)


def _costs(runs: Sequence[RunRecord]) -> list[_Cost]:
    longest = max(float(run.last.time[-1]) for run in runs)
    unit = time_unit(longest)
    epochs = max(float(run.last.epoch[-1]) for run in runs)
    costs = [
        _Cost(f"wall-clock time ({unit.symbol})", longest / unit.size, lambda _, each: each.time / unit.size),
        _Cost("epochs", epochs, lambda _, each: each.epoch),
    ]
    none_sent = [uses_mostly_shared_memory(run) for run in runs]
    label = "bytes sent per rank ({})" + "\n(none: not drawn)" * any(none_sent)
    if all(none_sent):
        label = "bytes in shared memory per rank ({})"

    def moved(run: RunRecord, columns: Columns) -> Floats:
        # A run with zero bytes would be a line on the vertical axis.
        hidden = uses_mostly_shared_memory(run) and not all(none_sent)
        mean = moved_bytes(run, columns).mean(axis=1)
        return np.full(len(columns), np.nan) if hidden else mean

    most = float(max(np.nan_to_num(moved(run, run.last)[-1]) for run in runs))
    if most > 0:
        size = byte_unit(most)
        costs.append(
            _Cost(label.format(size.symbol), most / size.size, lambda *each: moved(*each) / size.size)
        )
    return costs


def _ranks_chart(lines: Sequence[Line]) -> Chart | None:
    from matplotlib.patches import Patch

    shown = [line for line in lines if len(line.run.train)]
    if not shown:
        return None
    per_step = [_per_step(line.run) for line in shown]
    longest = max(float(times.sum(axis=0).max()) for times in per_step)
    unit = time_unit(longest)
    panels = [
        partial(
            _ranks,
            times=times / unit.size,
            top=1.05 * longest / unit.size,
            unit=unit.symbol,
            color=line.color,
        )
        for times, line in zip(per_step, shown, strict=True)
    ]
    legend = [(Patch(facecolor=INK), "computing"), (Patch(facecolor=INK, alpha=_PALE), "waiting")]
    return Chart("ranks", "Time per step on each rank", panels, legend, [line.label for line in shown])


def _per_step(run: RunRecord) -> Floats:
    """Mean compute and wait seconds per step, float64 of shape (2, ranks)."""
    steps = max(int(run.train.step[-1]), 1)
    return np.stack([run.train.compute_seconds[-1], run.train.wait_seconds[-1]]) / steps


def _ranks(axes: Axes, position: PanelPosition, *, times: Floats, top: float, unit: str, color: str) -> None:
    from matplotlib.ticker import MaxNLocator

    compute, wait = times
    ranks = np.arange(len(compute))
    width = 0.7 if len(ranks) <= _MAX_SEPARATE_BARS else 1.0
    axes.bar(ranks, compute, width, color=color)
    axes.bar(ranks, wait, width, bottom=compute, color=color, alpha=_PALE)
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlim(-0.6, len(ranks) - 0.4)
    axes.set_ylim(0, top or 1)
    axes.set_xlabel("rank")
    vertical(axes, position, f"mean time per step ({unit})")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
