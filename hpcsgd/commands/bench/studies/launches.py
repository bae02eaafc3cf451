"""A study over several links, of which each is a launch of its own; the runs of all go into one folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import carry_out, check_each_once, find
from hpcsgd.commands.bench.studies.subworlds import ranks_of
from hpcsgd.commands.bench.studies.time_to_loss import Study, Trial
from hpcsgd.commands.bench.studies.workloads import FAST, Setting, Workload, planned
from hpcsgd.commands.bench.timing import check_positive
from hpcsgd.errors import BadOption, unknown
from hpcsgd.mpi.world import World
from hpcsgd.strategies import STRATEGIES


def measure(
    study: type[Study],
    methods: Sequence[str],
    out: str | Path,
    data: str = "digits",
    link: str = FAST,
    seeds: int = 3,
    **given: Any,
) -> None:
    """Train with each method on this job's ranks, all equally fast and some slow; rank 0 prints tables.

    The link between the ranks is the launch's; here it has a label, and launches with other links go on in
    the same folder. Methods take turns within a seed, so that what disturbs the machine disturbs them all;
    all have as many workers as the one with the most servers. In `out` are the runs, CSV, Markdown, and a
    figure, test loss against time. Tables and files show what is complete in `out`, of these methods on as
    many ranks, over any link: this data set with these options, others with their defaults. A study that
    was stopped goes on with the same command.

    Parameters
    ----------
    study
        What is made of the runs.
    methods
        Strategies, as of `hpcsgd train --strategy`.
    out
        A folder.
    data
        A name of the study's workloads. Default "digits".
    link
        A label of letters, digits, dots and underscores. Default "fast", for which other goals hold.
    seeds
        Runs of each, at least 1; fewer of other launches are shown too. Default 3.
    given
        Attributes of the `Workload` by name, in place of its own; None leaves it.

    Raises
    ------
    BadOption
        An option out of its range, or a method or data set that does not exist.
    HpcsgdError
        On all ranks, where a run fails.
    """
    if data not in study.workloads:
        raise unknown("data set of this study", data, study.workloads)
    if not re.fullmatch(r"[\w.]+", link):
        raise BadOption("link", expected="letters, digits, dots and underscores", got=repr(link))
    check_each_once("methods", methods)
    for method in methods:
        registry.build(STRATEGIES, method, "strategy")
    workload = replace(
        study.workloads[data], **{name: value for name, value in given.items() if value is not None}
    )
    check_positive("seeds, base_ms and target", [seeds, workload.base_ms, workload.target])
    workloads = {**study.workloads, data: workload}
    plan = [
        planned(workload, Setting(data, link, slow), seed, method)
        for slow in (0, study.slow)
        for seed in range(seeds)
        for method in methods
    ]
    with World(device="cpu") as world:
        out = Path(out)
        output.check_writable(world, out / f"{study.name}.csv")
        carry_out(world, out, plan)
        if world.rank == 0:
            trials = list(complete(out, workloads, ranks_of(methods, world.size), seeds, study.slow))
            targets = {name: workload.target for name, workload in workloads.items()}
            study(trials, targets).publish(out, output.facts(world))


def complete(
    out: Path, workloads: Mapping[str, Workload], ranks: Mapping[str, int], seeds: int, slow: int
) -> Iterator[Trial]:
    """The runs in a folder: in each setting the methods of which the most seeds are there.

    Parameters
    ----------
    out
        Of the study.
    workloads
        By data set.
    ranks
        Of each method.
    seeds
        How many to look for.
    slow
        How many ranks are, where some are.
    """
    for data, workload in workloads.items():
        links = {run.name.split("-")[1] for run in out.glob(f"{data}-*-*-*-*")}
        settings = [Setting(data, link, count) for link in links for count in (0, slow)]
        for setting in sorted(settings, key=lambda setting: setting.column):
            runs = {
                method: [
                    *takewhile(
                        bool,
                        (
                            find(out, *planned(workload, setting, seed, method), count)
                            for seed in range(seeds)
                        ),
                    )
                ]
                for method, count in ranks.items()
            }
            most = max(map(len, runs.values()))
            for method, found in runs.items():
                if len(found) == most:
                    yield from (Trial(setting, seed, method, run) for seed, run in enumerate(found) if run)
