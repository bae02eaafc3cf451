"""Studies with a launch per link, whose runs go into one folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import find_finished, run_plan
from hpcsgd.commands.bench.studies.subworlds import ranks_per_method
from hpcsgd.commands.bench.studies.time_to_loss import TimeToLossStudy, TimeToLossTrial
from hpcsgd.commands.bench.studies.workloads import FAST, StudyCondition, Workload, plan_run
from hpcsgd.mpi.world import World


def run_study(
    study: type[TimeToLossStudy],
    methods: Sequence[str],
    out: str | Path,
    data: str = "digits",
    link: str = FAST,
    seeds: int = 3,
    **overrides: Any,
) -> None:
    """Train with each method on this job's ranks, equally fast and with slow ranks; rank 0 prints tables.

    The network between the ranks is that of the launch; `link` only labels it, and launches with other labels
    add to the same folder. The methods alternate within a seed, so that a disturbance of the machine affects
    all of them; all have as many workers as the method with the most servers. `out` gets the runs, tables as
    CSV and Markdown, and a figure of test loss against time. These show all complete runs in `out` of these
    methods with the same number of ranks, over any link: this data set with these options, others with their
    defaults. A study that was interrupted continues with the same command.

    Parameters
    ----------
    study
        The class of the study.
    methods
        Strategies, as for `hpcsgd train --strategy`.
    out
        The folder of the study.
    data
        The name of one of the study's workloads. Default "digits".
    link
        A label of letters, digits, dots and underscores. Default "fast", to which other goals apply.
    seeds
        Runs per method and condition, at least 1; conditions of other launches with fewer seeds are shown
        too. Default 3.
    overrides
        Attributes of the `Workload` to replace, by name; None keeps the workload's value.

    Raises
    ------
    BadOption
        An option of `Workload` is out of its range.
    HpcsgdError
        On all ranks, if a run fails.
    """
    workload = replace(
        study.workloads[data], **{name: value for name, value in overrides.items() if value is not None}
    )
    workloads = {**study.workloads, data: workload}
    plan = [
        plan_run(workload, StudyCondition(data, link, slow_ranks), seed, method)
        for slow_ranks in (0, study.slow_ranks)
        for seed in range(seeds)
        for method in methods
    ]
    with World(device="cpu") as world:
        out = Path(out)
        output.check_writable(world, out / f"{study.name}.csv")
        run_plan(world, out, plan)
        if world.rank == 0:
            ranks = ranks_per_method(methods, world.size)
            trials = list(finished_trials(out, workloads, ranks, seeds, study.slow_ranks))
            targets = {name: workload.target for name, workload in workloads.items()}
            study(trials, targets).publish(out, output.environment(world))


def finished_trials(
    out: Path, workloads: Mapping[str, Workload], ranks: Mapping[str, int], seeds: int, slow_ranks: int
) -> Iterator[TimeToLossTrial]:
    """The complete runs in a folder: under each condition those of the methods with the most seeds.

    Parameters
    ----------
    out
        The folder of the study.
    workloads
        The workload of each data set.
    ranks
        The number of ranks of each method.
    seeds
        The largest number of seeds to look for.
    slow_ranks
        The number of slow ranks, under the conditions that have any.
    """
    for data, workload in workloads.items():
        links = {run.name.split("-")[1] for run in out.glob(f"{data}-*-*-*-*")}
        conditions = [StudyCondition(data, link, count) for link in links for count in (0, slow_ranks)]
        for condition in sorted(conditions, key=lambda condition: condition.column):
            runs = {
                method: [
                    *takewhile(
                        bool,
                        (
                            find_finished(out, *plan_run(workload, condition, seed, method), count)
                            for seed in range(seeds)
                        ),
                    )
                ]
                for method, count in ranks.items()
            }
            most = max(map(len, runs.values()))
            for method, complete in runs.items():
                if len(complete) == most:
                    for seed, run in enumerate(complete):
                        assert run is not None, "takewhile stops at the first seed that is missing"
                        yield TimeToLossTrial(condition, seed, method, run)
