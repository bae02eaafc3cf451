"""A trace as a picture: what both threads of every rank did in some of its steps."""

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

_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _ = PALETTE
#: What the legend calls events, by name or category, and their colours; what lies in others comes later.
_LOOKS = {
    "batch": ("batch", "#B8B8B8"),
    "forward": ("forward", _SKY),
    "backward": ("backward", _BLUE),
    "update": ("optimizer's update", _GREEN),
    "evaluation": ("evaluation", "#7A6A53"),
    "checkpoint": ("checkpoint", "#C8B89A"),
    "communication": ("communication", _ORANGE),
    "service": ("communication", _ORANGE),
    "codec": ("encode, decode", _PINK),
    "wait": ("waits", "#F3D9C4"),
}
_ROW, _WIDTH = 0.24, 7.4  # inches


def timeline(trace: Path, first: int | None = None, last: int | None = None) -> Figure:
    """Draw a trace, with two rows a rank.

    Parameters
    ----------
    trace
        A file of `hpcsgd train --trace`.
    first, last
        Steps: from the first beginning of one to the last end of the other. Default: all.

    Raises
    ------
    HpcsgdError
        The file is no trace, or has no such steps.
    """
    events = _read(trace)
    begin, end = _window(events, first, last)
    with style():
        from matplotlib.figure import Figure

        names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
        rows = [(rank, lane) for rank in sorted(names) for lane in (0, 1)]
        figure = Figure(figsize=(_WIDTH, 0.9 + _ROW * len(rows)), layout="constrained")
        axes = figure.subplots()
        inside = [e for e in events if e["ph"] == "X" and e["ts"] < end and e["ts"] + e["dur"] > begin]
        _draw(axes, inside, {row: index for index, row in enumerate(rows)}, begin)
        threads = ("compute", "communication")
        axes.set_yticks(
            range(len(rows)), [f"{names[r]}: {threads[n]}" if n == 0 else threads[n] for r, n in rows]
        )
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
            f"{trace} is not a trace", got=error, do="name one of `hpcsgd train --trace`"
        ) from error
    return events


def _window(events: Iterable[Event], first: int | None, last: int | None) -> tuple[float, float]:
    steps = [e for e in events if e.get("cat") == "step"]
    chosen = [
        e
        for e in steps
        if (first is None or e["args"]["step"] >= first) and (last is None or e["args"]["step"] <= last)
    ]
    if not chosen:
        numbers = [e["args"]["step"] for e in steps]
        known = f"steps {min(numbers)} to {max(numbers)}" if numbers else "no steps"
        raise BadOption("the trace has no such steps", got=f"{first} to {last}", expected=known)
    return min(e["ts"] for e in chosen), max(e["ts"] + e["dur"] for e in chosen)


def _draw(axes: Axes, events: Iterable[Event], rows: dict[tuple[int, int], int], begin: float) -> None:
    from matplotlib.patches import Patch

    bars = defaultdict(list)
    for event in events:
        row = rows[event["pid"], event["tid"]]
        left = (event["ts"] - begin) / 1e3
        if event["cat"] == "step":
            axes.vlines(left, row - 0.5, row + 0.5, colors=INK, linewidth=0.6)
            continue
        look = event["name"] if event["name"] in _LOOKS else event["cat"]
        bars[look, row].append((left, event["dur"] / 1e3))
    order = list(_LOOKS)
    for (look, row), spans in sorted(bars.items(), key=lambda bar: order.index(bar[0][0])):
        inset = 0.12 if look in ("wait", "codec") else 0.0
        edge = "white" if look == "communication" else "none"
        size = (row - 0.4 + inset, 0.8 - 2 * inset)
        axes.broken_barh(spans, size, facecolors=_LOOKS[look][1], edgecolors=edge, linewidth=0.4)
    shown = dict(_LOOKS[look] for look in order if any(look == used for used, _ in bars))
    axes.figure.legend(
        [Patch(color=colour) for colour in shown.values()],
        list(shown),
        loc="outside upper left",
        ncols=len(shown),
    )
