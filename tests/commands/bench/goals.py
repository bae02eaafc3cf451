"""The goals of the studies, judged by their CSV files: `python tests/commands/bench/goals.py FILE`.

One line per goal whose methods have run, with the measured value: medians over the seeds.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median

Row = Mapping[str, str]
#: Largest ratio of LASGD's time to the target to all-reduce's, by (fast link?, a slow rank?).
_ASYNCHRONOUS = {(True, False): 1.05, (True, True): 0.4, (False, False): 0.35}
_MAX_LOSS = 0.005  # of accuracy that asynchrony may cost
_ELASTIC = 0.4  # of the time to the target of servers without groups, on a slow link
#: Largest ratio of cb-DyBW's time per iteration to cb-Full's, by the kind of simulated delays.
_BACKUP = {"slow": 0.5, "constant": 1.05}


def judge(rows: Sequence[Row]) -> list[str]:
    """A line per goal: the condition, what is compared, the measured value, the bound, and the verdict."""
    conditions: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        condition = row.get("data", ""), row.get("link", ""), row["simulated_delays"]
        conditions.setdefault(condition, {}).setdefault(row["method"], []).append(row)
    lines = []
    for (data, link, delays), runs in conditions.items():
        kind = delays.split(":")[0]
        judged = _in_study(link, kind, runs) if link else _with_stragglers(kind, runs)
        where = ", ".join(filter(None, (data, link, delays)))
        for goal, measured, bound in judged:
            verdict = "met" if measured <= bound else "not met"
            lines.append(f"{where}: {goal}: {measured:.3f}, at most {bound:.3f}: {verdict}")
    return lines


def _in_study(link: str, kind: str, runs: Mapping[str, list[Row]]) -> Iterator[tuple[str, float, float]]:
    fast, slow = link == "fast", kind == "slow"
    adaptive, baseline = runs.get("lasgd:period=auto") or runs.get("lasgd"), runs.get("allreduce")
    if adaptive and baseline:
        if bound := _ASYNCHRONOUS.get((fast, slow)):
            yield "LASGD ÷ all-reduce, time to the target", _to_target(adaptive) / _to_target(baseline), bound
        lost = mean(float(r["accuracy"]) for r in baseline) - mean(float(r["accuracy"]) for r in adaptive)
        yield "accuracy that LASGD loses", lost, _MAX_LOSS
    elastic, pure = runs.get("ps:mode=elastic,groups=4"), runs.get("ps:mode=sync,groups=8")
    if elastic and pure and not fast:
        ratio = _to_target(elastic) / _to_target(pure)
        yield "elastic in groups ÷ synchronous without, time to the target", ratio, _ELASTIC


def _with_stragglers(kind: str, runs: Mapping[str, list[Row]]) -> Iterator[tuple[str, float, float]]:
    if "backup" not in runs or "backup:backups=0" not in runs or kind not in _BACKUP:
        return
    dynamic, full = (
        median(float(row["ms_per_iteration"]) for row in runs[method])
        for method in ("backup", "backup:backups=0")
    )
    yield "cb-DyBW ÷ cb-Full, time per iteration", dynamic / full, _BACKUP[kind]
    if kind == "slow":
        first = min(_to_target(rows) for method, rows in runs.items() if method != "backup")
        yield "cb-DyBW ÷ the first of the others, time to the target", _to_target(runs["backup"]) / first, 1


def _to_target(rows: Sequence[Row]) -> float:
    return median(float(row["seconds_to_target"] or "inf") for row in rows)


def read(path: Path) -> list[Row]:
    """The rows of a study's CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(*judge(read(Path(path))), sep="\n")
