"""The HTML page of a report: summary, figures and settings in one file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hpcsgd.commands.report.figures import DASHES, INK, Chart, Dashes, draw_alone, svg
from hpcsgd.commands.report.labels import differences, format_value, labels, settings
from hpcsgd.commands.report.plots import Line, Section, sections
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.summary import cells
from hpcsgd.commands.report.words import in_words

_CSS = """
:root {
  color-scheme: light dark;
  --ink: #1a1a1b; --soft: #5c5f66; --line: #d9dbdf; --page: #fff; --band: #f5f6f7;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a3a7ae; --line: #3a3d42; --page: #16181b; --band: #1f2226 }
  svg { filter: brightness(1.25) }
}
* { box-sizing: border-box }
body {
  margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 76rem;
  color: var(--ink); background: var(--page); font: 1rem/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; overflow-wrap: anywhere }
h3 { font-size: .9rem; margin: 1.25rem 0 .4rem; color: var(--soft) }
p, li { color: var(--soft); font-size: .9rem }
p { margin: .4rem 0; max-width: 60rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td {
  padding: .4rem .7rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: bottom;
}
thead th { color: var(--soft); font-weight: 600; min-width: 5.5rem }
td { white-space: nowrap }
th:first-child {
  position: sticky; left: 0; background: var(--page); text-align: left; padding-left: 0;
  min-width: min(19rem, 40vw); overflow-wrap: anywhere;
}
.words td, .words th { text-align: left }
.legend {
  display: flex; flex-wrap: wrap; gap: .2rem 1.25rem; list-style: none;
  margin: 2.25rem 0 0; padding: .5rem 0; background: var(--page); border-bottom: 1px solid var(--line);
}
.legend li { display: flex; align-items: center; gap: .45rem; color: var(--ink); overflow-wrap: anywhere }
.line { flex: none; width: 2rem }
@media (min-width: 60rem) and (min-height: 40rem) {
  .legend { position: sticky; top: 0; z-index: 1; max-height: 25vh; overflow-y: auto }
}
.figures {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
}
figure { margin: 0; display: flex; flex-direction: column; justify-content: end }
figcaption { font-size: .8rem; overflow-wrap: anywhere }
figure svg { width: 100%; max-width: 30rem; height: auto; display: block }
summary { cursor: pointer; padding: .3rem 0; overflow-wrap: anywhere }
pre {
  margin: .3rem 0 1rem; padding: .8rem; overflow-x: auto;
  background: var(--band); border-radius: .4rem; font-size: .85rem;
}
"""

_DASH_PATTERNS: dict[Dashes, str] = dict(
    zip(DASHES, ("none", "8 3.4", "14 3.5 2.2 3.5", "2.2 3.6"), strict=True)
)
_EXPLANATION = (
    "Accuracy and loss: on the test data. Time: since the first step. Bytes per rank: bytes sent in MPI "
    "messages, mean over the ranks; marked shared if they include bytes moved through node-shared memory. "
    "Compression: bytes without compression over bytes moved. Waiting: share of compute plus wait time, over "
    "all ranks. Slowest rank: the rank with the longest compute time, with the ratio to the median of the "
    "ranks in parentheses. Training loss, below: mean over the batches since the point before."
)
_RANKS_EXPLANATION = "Solid: computing. Translucent, above it: waiting for other ranks."


def page(runs: Sequence[RunRecord]) -> str:
    """Return the report on runs as one self-contained HTML page.

    Raises
    ------
    HpcsgdError
        matplotlib is not installed.
    """
    names = labels(runs)
    title = f"Run {names[0]}" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_common(runs))}</p>",
        "<h2>Summary</h2>",
        _table(*cells(runs)),
        f"<p>{escape(_EXPLANATION)}</p>",
        _notes(runs, names),
        _charts(sections(runs)),
        _differences(runs, names),
        _configs(runs, names),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · hpcsgd</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + "\n</body>\n</html>\n"
    )


def _common(runs: Sequence[RunRecord]) -> str:
    config, differing = settings(runs[0]), set(differences(runs))
    keys = ("data", "model", "strategy", "batch", "learning_rate", "world.ranks", "world.nodes")
    shared = [key for key in keys if key in config and key not in differing]
    return " · ".join(
        f"{key.split('.')[-1].replace('_', ' ')}: {in_words(format_value(config[key]))}" for key in shared
    )


def _notes(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    notes = [f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes]
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _charts(parts: Sequence[Section]) -> str:
    """All charts, below the one legend of the page."""
    body = [_legend([line for part in parts for line in part.lines])]
    for part in parts:
        body.append(f"<h2>{escape(part.title)}</h2>")
        body += (_panels(chart) for chart in part.curves)
        if part.ranks:
            body += [
                _panels(part.ranks),
                f"<p>{_RANKS_EXPLANATION}</p>",
            ]
    return '<div class="charts">\n' + "\n".join(body) + "\n</div>"


def _legend(lines: Iterable[Line]) -> str:
    entries = {line.label: line for line in lines}
    items = (f"<li>{_sample(line.color, line.dashes)}{escape(line.label)}</li>" for line in entries.values())
    return '<ul class="legend">' + "".join(items) + "</ul>"


def _sample(color: str, dashes: Dashes) -> str:
    """A piece of a run's line; the patterns are those of matplotlib."""
    pattern = _DASH_PATTERNS[dashes]
    return (
        '<svg class="line" viewBox="0 0 32 8" aria-hidden="true"><path d="M0 4H32" stroke-width="2.2" '
        f'stroke="{"currentColor" if color == INK else color}" stroke-dasharray="{pattern}"/></svg>'
    )


def _panels(chart: Chart) -> str:
    captions = [f"<figcaption>{escape(caption)}</figcaption>" for caption in chart.captions]
    drawn = "\n".join(
        f"<figure>{caption}{svg(draw_alone(panel), escape(chart.title))}</figure>"
        for panel, caption in zip(chart.panels, captions or [""] * len(chart.panels), strict=True)
    )
    return f'<h3>{escape(chart.title)}</h3>\n<div class="figures">\n{drawn}\n</div>'


def _differences(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    keys = differences(runs)
    if not keys:
        return ""
    configs = [settings(run) for run in runs]
    rows = [
        [name, *(format_value(config.get(key)) for key in keys)]
        for name, config in zip(names, configs, strict=True)
    ]
    return "<h2>Settings that differ</h2>\n" + _table(["Run", *keys], rows, kind="words")


def _configs(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    details = [
        f"<details><summary>{escape(name)}</summary><p>{escape(run.folder.name)}/config.toml</p>"
        f"<pre>{escape(run.config_text)}</pre></details>"
        for run, name in zip(runs, names, strict=True)
    ]
    return "\n".join(["<h2>All settings</h2>", *details])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
