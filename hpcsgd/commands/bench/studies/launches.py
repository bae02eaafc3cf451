"""`hpcsgd bench async` and `ps`: studies with a launch per link, whose runs go into one folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from itertools import takewhile
from pathlib import Path

from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.devices import open_world
from hpcsgd.commands.bench.options import AsyncOptions, ServerOptions, StudyOptions
from hpcsgd.commands.bench.output import Column
from hpcsgd.commands.bench.studies.runner import find_finished, ranks_per_method, run_plan
from hpcsgd.commands.bench.studies.time_to_loss import LossRuns, TimeToLossStudy, TimeToLossTrial
from hpcsgd.commands.bench.studies.workloads import EIGHT_WORKER_WORKLOADS, StudyCondition, Workload, plan_run


class AsyncStudy(TimeToLossStudy):
    """All-reduce, local SGD, gossip and LASGD."""

    name = "async"
    slow_ranks = 1
    baseline = "allreduce"


class ServerStudy(TimeToLossStudy):
    """Parameter servers in each mode, with groups of one rank and of two, and all-reduce SGD."""

    name = "ps"
    slow_ranks = 2
    baseline = "ps:mode=sync,groups=8"
    workloads = EIGHT_WORKER_WORKLOADS
    notes = f"{TimeToLossStudy.notes} Bytes through the servers: pushes and replies of a whole run."

    def final_columns(self) -> list[Column[LossRuns]]:
        name = "MB through\nthe servers"
        moved: Column[LossRuns] = Column(lambda r: r.median(lambda t: t.server_bytes / 1e6), "", name, ".0f")
        return [*super().final_columns(), moved]


_STUDIES = {AsyncOptions: AsyncStudy, ServerOptions: ServerStudy}


def main(options: StudyOptions) -> None:
    """Train with each method on this job's ranks, equally fast and with slow ranks; rank 0 prints tables.

    The network between the ranks is that of the launch; `link` only labels it, and launches with other labels
    add to the same folder. The methods alternate within a seed, so that a disturbance of the machine affects
    all of them; all have as many workers as the method with the most servers. `out` gets the runs, tables as
    CSV and Markdown, and a figure of test loss against time. These show all complete runs in `out` of these
    methods with the same number of ranks, over any link: this data set with these options, others with their
    defaults. Conditions of other launches with fewer seeds are shown too.
    """
    study: type[TimeToLossStudy] = _STUDIES[type(options)]
    data, out, methods = options.data, options.out, options.methods
    given = {field.name: getattr(options, field.name) for field in fields(Workload) if field.name != "data"}
    workload = replace(study.workloads[data], **{k: value for k, value in given.items() if value is not None})
    workloads = {**study.workloads, data: workload}
    plan = [
        plan_run(workload, StudyCondition(data, options.link, slow_ranks), seed, method)
        for slow_ranks in (0, study.slow_ranks)
        for seed in range(options.seeds)
        for method in methods
    ]
    with open_world(path=out / f"{study.name}.csv") as world:
        run_plan(world, out, plan)
        if world.rank == 0:
            ranks = ranks_per_method(methods, world.size)
            trials = list(finished_trials(out, workloads, ranks, options.seeds, study.slow_ranks))
            environment = output.environment(world)
            del environment["host"]  # which differs between launches
            study(trials).publish(out, environment)


def finished_trials(
    out: Path, workloads: Mapping[str, Workload], ranks: Mapping[str, int], seeds: int, slow_ranks: int
) -> Iterator[TimeToLossTrial]:
    """The complete runs in a folder: under each condition those of the methods with the most seeds.

    `workloads` has that of each data set, `ranks` the number of ranks of each method; `seeds` is the largest
    number to look for, `slow_ranks` the number under the conditions that have any.
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
                        yield TimeToLossTrial(condition, seed, method, run, workload.target)
