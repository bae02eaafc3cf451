"""Draws a trace: the activity of the compute and the communication thread of every rank over time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcsgd.commands.report.figures import INK, PALETTE, style
from hpcsgd.errors import BadOption, HpcsgdError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = dict[str, Any]

_, _BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY = PALETTE
#: Legend text and colour of events, by name or category; events nested in others come later.
_STYLES = {
    "batch": ("batch", "#B8B8B8"),
    "forward": ("forward", _SKY),
    "backward": ("backward", _BLUE),
    "update": ("optimizer's update", _GREEN),
    "evaluation": ("evaluation", "#7A6A53"),
    "checkpoint": ("checkpoint", "#C8B89A"),
    "communication": ("communication", _ORANGE),
    "service": ("communication", _ORANGE),
    "codec": ("encode, decode", _PINK),
    "wait": ("waiting", "#F3D9C4"),
}
_ROW, _WIDTH = 0.24, 7.4  # inches


def timeline(trace: Path, first: int | None = None, last: int | None = None) -> Figure:
    """Draw the trace.json of `hpcsgd train --trace`, with two rows per rank.

    From the earliest start of step `first` to the latest end of step `last` on any rank. Default: all steps.

    Raises
    ------
    HpcsgdError
        The file is not a trace, or has no such steps.
    """
    events = _read(trace)
    begin, end = _window(events, first, last)
    with style():
        from matplotlib.figure import Figure

        names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        rows = [(rank, thread) for rank in sorted(names) for thread in (0, 1)]
        figure = Figure(figsize=(_WIDTH, 0.9 + _ROW * len(rows)), layout="constrained")
        axes = figure.subplots()
        inside = [e for e in events if e["ph"] == "X" and e["ts"] < end and e["ts"] + e["dur"] > begin]
        _draw(axes, inside, {row: index for index, row in enumerate(rows)}, begin)
        threads = ("compute", "communication")
        axes.set_yticks(range(len(rows)), [f"{names[r]}: {threads[n]}" for r, n in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, (end - begin) / 1e3)
        axes.set_xlabel("milliseconds")
        axes.grid(visible=False)
        return figure


def _read(trace: Path) -> list[Event]:
    try:
        events: list[Event] = json.loads(trace.read_text())["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HpcsgdError(
            f"{trace} is not a trace", got=error, do="give the trace.json of `hpcsgd train --trace`"
        ) from error
    return events


def _window(events: Iterable[Event], first: int | None, last: int | None) -> tuple[float, float]:
    steps = [e for e in events if e.get("cat") == "step"]
    selected = [
        e
        for e in steps
        if (first is None or e["args"]["step"] >= first) and (last is None or e["args"]["step"] <= last)
    ]
    if not selected:
        numbers = [e["args"]["step"] for e in steps]
        known = f"steps {min(numbers)} to {max(numbers)}" if numbers else "no steps"
        raise BadOption(
            "--steps: the trace has no such steps",
            expected=known,
            got=f"{first} to {last}",
            do="give --steps FIRST:LAST within these steps, or trace a run that takes steps",
        )
    return min(e["ts"] for e in selected), max(e["ts"] + e["dur"] for e in selected)


def _draw(axes: Axes, events: Iterable[Event], rows: dict[tuple[int, int], int], begin: float) -> None:
    from matplotlib.patches import Patch

    bars = defaultdict(list)
    for event in events:
        row = rows[event["pid"], event["tid"]]
        left = (event["ts"] - begin) / 1e3
        if event["cat"] == "step":
            axes.vlines(left, row - 0.5, row + 0.5, colors=INK, linewidth=0.6)
            continue
        style_key = event["name"] if event["name"] in _STYLES else event["cat"]
        bars[style_key, row].append((left, event["dur"] / 1e3))
    order = list(_STYLES)
    for (style_key, row), spans in sorted(bars.items(), key=lambda bar: order.index(bar[0][0])):
        inset = 0.12 if style_key in ("wait", "codec") else 0.0
        edge = "white" if style_key == "communication" else "none"
        size = (row - 0.4 + inset, 0.8 - 2 * inset)
        axes.broken_barh(spans, size, facecolors=_STYLES[style_key][1], edgecolors=edge, linewidth=0.4)
    shown = dict(_STYLES[style_key] for style_key in order if any(style_key == used for used, _ in bars))
    axes.figure.legend(
        [Patch(color=colour) for colour in shown.values()],
        list(shown),
        loc="outside upper left",
        ncols=len(shown),
    )
