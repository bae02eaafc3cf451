"""One HTML page that holds everything: numbers, figures, settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from hpcsgd.commands.report.figures import Chart, draw, svg
from hpcsgd.commands.report.labels import differences, flat, labels, written
from hpcsgd.commands.report.plots import charts
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.summary import cells

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
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem }
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
  min-width: min(14rem, 40vw); overflow-wrap: anywhere;
}
.words td, .words th { text-align: left }
.figures {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
}
figure { margin: 0 }
svg { width: 100%; max-width: 30rem; height: auto; display: block }
summary { cursor: pointer; padding: .3rem 0; overflow-wrap: anywhere }
pre {
  margin: .3rem 0 1rem; padding: .8rem; overflow-x: auto;
  background: var(--band); border-radius: .4rem; font-size: .85rem;
}
"""

_READING = (
    "Accuracy and loss are those of the test data. Time runs from the first step. "
    "Bytes per rank is the mean over ranks of what it handed to messages, or, where it says "
    "shared, of what it moved through memory shared by its node. Waiting is the share of waiting "
    "in computing and waiting, over all ranks. The slowest rank is the one that computed longest, "
    "beside it its compute time over the median of the ranks."
)


def page(runs: Sequence[RunRecord]) -> str:
    """Write the report of some runs as one HTML page that needs nothing else.

    Parameters
    ----------
    runs
        At least one run.

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
        f"<p>{escape(_READING)}</p>",
        _notes(runs, names),
        *map(_figures, charts(runs)),
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
    config, differing = flat(runs[0].config), set(differences(runs))
    wanted = ("data", "model", "strategy", "batch", "learning_rate", "world.ranks", "world.nodes")
    shared = [key for key in wanted if key in config and key not in differing]
    return " · ".join(f"{key.split('.')[-1].replace('_', ' ')}: {written(config[key])}" for key in shared)


def _notes(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    notes = [f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes]
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else ""


def _figures(chart: Chart) -> str:
    drawn = "\n".join(f"<figure>{svg(draw(panel), escape(chart.title))}</figure>" for panel in chart.alone())
    return f'<h2>{escape(chart.title)}</h2>\n<div class="figures">\n{drawn}\n</div>'


def _differences(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    keys = differences(runs)
    if not keys:
        return ""
    configs = [flat(run.config) for run in runs]
    rows = [
        [name, *(written(config.get(key)) for key in keys)]
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
