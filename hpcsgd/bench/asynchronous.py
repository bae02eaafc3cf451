"""`hpcsgd bench async`: methods that wait and that do not, with a slow rank, simulated, or a slow link."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hpcsgd import specs
from hpcsgd.bench import output
from hpcsgd.bench.asynchronous_results import FAST, Setting, Study, Trial
from hpcsgd.bench.study import carry_out, check_each_once, find
from hpcsgd.bench.timing import check_positive
from hpcsgd.errors import BadOption, unknown
from hpcsgd.settings import FIELDS, Settings, validate
from hpcsgd.strategies import STRATEGIES
from hpcsgd.world import World

METHODS = ("allreduce", "local:period=8", "sgp", "adpsgd", "lasgd:period=auto")
_FACTOR = 4  # how many times as long gradients of the slow rank take


@dataclass(frozen=True)
class Workload:
    """What is trained, and how, by all methods alike.

    Attributes
    ----------
    data, model, optimizer, learning_rate, warmup, clip, batch, epochs, evaluate_every
        As of `hpcsgd train`; after the warm-up the learning rate is constant.
    target
        Test loss.
    base_ms
        What a gradient takes, simulated, in milliseconds; of the slow rank four times that.
    """

    data: str
    model: str
    optimizer: str
    learning_rate: float
    warmup: float
    clip: float | None
    batch: int
    epochs: float
    evaluate_every: float
    target: float
    base_ms: float


WORKLOADS = {
    "digits": Workload(
        data="digits",
        model="2nn:width=400",
        optimizer="sgd:momentum=0.9",
        learning_rate=0.03,
        warmup=0.0,
        clip=None,
        batch=32,
        epochs=10.0,
        evaluate_every=1.25,
        target=0.3,
        base_ms=20.0,
    ),
    "text": Workload(
        data="text:limit=0.217,context=32",
        model="gpt:layers=1,width=160",
        optimizer="sgd:momentum=0.9",
        learning_rate=0.05,
        warmup=0.1,
        clip=1.0,
        batch=8,
        epochs=0.5,
        evaluate_every=0.0625,
        target=2.95,
        base_ms=50.0,
    ),
}


def main(
    data: str = "digits",
    link: str = FAST,
    methods: Sequence[str] = METHODS,
    seeds: int = 3,
    out: str | Path = "async",
    **given: Any,
) -> None:
    """Train with each method on this job's ranks, all equally fast and with one slow; rank 0 prints tables.

    The link between the ranks is the launch's; here it has a label, and launches with other links go on in
    the same folder. Methods take turns within a seed, so that what disturbs the machine disturbs them all. In
    `out` are the runs, `async.csv`, and `async.png`, test loss against time. Tables and files show what is
    complete in `out`, of these methods and seeds on as many ranks, over any link: this data set with these
    options, others with their defaults. A study that was stopped goes on with the same command.

    Parameters
    ----------
    data
        A name of `WORKLOADS`. Default "digits".
    link
        A label of letters, digits, dots and underscores. Default "fast", for which other goals hold.
    methods
        Strategies, as of `hpcsgd train --strategy`.
    seeds
        Runs of each, at least 1. Default 3.
    out
        A folder. Default "async".
    given
        Attributes of the `Workload` by name, in place of its own; None leaves it.

    Raises
    ------
    BadOption
        An option out of its range, or a method or data set that does not exist.
    HpcsgdError
        On all ranks, where a run fails.
    """
    if data not in WORKLOADS:
        raise unknown("data set of this study", data, WORKLOADS)
    if not re.fullmatch(r"[\w.]+", link):
        raise BadOption("link", expected="letters, digits, dots and underscores", got=repr(link))
    check_each_once("methods", methods)
    for method in methods:
        specs.build(STRATEGIES, method, "strategy")
    workload = replace(WORKLOADS[data], **{name: value for name, value in given.items() if value is not None})
    check_positive("seeds, base_ms and target", [seeds, workload.base_ms, workload.target])
    workloads = {**WORKLOADS, data: workload}
    plan = [
        _planned(workload, setting, seed, method)
        for setting in (Setting(data, link, slow) for slow in (False, True))
        for seed in range(seeds)
        for method in methods
    ]
    with World(device="cpu") as world:
        out = Path(out)
        output.check_writable(world, out / "async.csv")
        carry_out(world, out, plan)
        if world.rank == 0:
            trials = list(_complete(out, workloads, methods, seeds, world.size))
            study = Study(trials, {name: workload.target for name, workload in workloads.items()})
            study.publish(out, output.facts(world))


def _planned(workload: Workload, setting: Setting, seed: int, method: str) -> tuple[str, Settings]:
    """The name and the settings of a run."""
    base = f"seconds={workload.base_ms / 1000:g}"
    settings = Settings(
        **{name: value for name, value in asdict(workload).items() if name in FIELDS},
        strategy=method,
        delays=f"slow:factor={_FACTOR},{base}" if setting.slow else f"constant:{base}",
        seed=seed,
        schedule="constant",
        checkpoint_every=0.0,
        threads=1,
    )
    speeds = "slow" if setting.slow else "equal"
    return f"{setting.data}-{setting.link}-{speeds}-{seed}-{method}", validate(settings)


def _complete(
    out: Path, workloads: Mapping[str, Workload], methods: Sequence[str], seeds: int, ranks: int
) -> Iterator[Trial]:
    """The runs in a folder, of each method in each setting all seeds or none."""
    for data, workload in workloads.items():
        links = {run.name.split("-")[1] for run in out.glob(f"{data}-*-*-*-*")}
        settings = [Setting(data, link, slow) for link in links for slow in (False, True)]
        for setting in sorted(settings, key=lambda setting: setting.column):
            for method in methods:
                plan = [_planned(workload, setting, seed, method) for seed in range(seeds)]
                runs = [found for one in plan if (found := find(out, *one, ranks))]
                if len(runs) == seeds:
                    yield from (Trial(setting, seed, method, run) for seed, run in enumerate(runs))
