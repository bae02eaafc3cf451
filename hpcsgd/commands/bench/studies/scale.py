"""`hpcsgd bench scale`: accuracy of gossip methods against the number of virtual nodes, on skewed data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import run_plan, with_option
from hpcsgd.commands.bench.studies.scale_results import ScaleStudy, ScaleTrial
from hpcsgd.commands.train.settings import Settings, validate
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.strategies import STRATEGIES
from hpcsgd.strategies import build as build_strategy
from hpcsgd.training.data import load
from hpcsgd.training.data.base import Source
from hpcsgd.training.data.partition import partition

T = TypeVar("T")

METHODS = (
    "dsgd:topology=ring",
    "dsgd:topology=exponential",
    "dsgd:topology=one-peer-exponential",
    "dsgd:topology=base",
    "teleport",
)
NODES = (8, 16, 32, 64)
ACTIVE = {"": 4}
#: The best of 0.03, 0.1 and 0.3 at 16 nodes.
RATES = {"dsgd": 0.3, "teleport": 0.1}


def main(
    methods: Sequence[str] = METHODS,
    nodes: Sequence[int] = NODES,
    active: Mapping[str, int] = ACTIVE,
    seeds: int = 3,
    steps: int = 150,
    batch: int = 8,
    alpha: float = 0.1,
    learning_rate: Mapping[str, float] = RATES,
    optimizer: str = "sgd:momentum=0.9",
    model: str = "2nn:width=64",
    data: str = "digits",
    out: str | Path = "scale",
) -> None:
    """Train with increasing numbers of virtual nodes on the ranks of this job; rank 0 prints a table.

    In every iteration each active node takes a batch of its own samples, and reshuffles them when the node
    with the fewest samples has used all of its own (`--uneven stop`). `out` gets the runs, `scale.csv`, and
    `scale.png`, accuracy against nodes. A study that was interrupted continues with the same command.

    Parameters
    ----------
    methods
        Strategies, as for `hpcsgd train --strategy`.
    nodes
        Numbers of virtual nodes, multiples of the number of ranks. Default 8, 16, 32, 64.
    active
        Active nodes of a teleport method that does not set them, by number of nodes, for example as found by
        `hpcsgd tune teleportation`; with the key "" for all numbers. Default 4.
    seeds
        Runs per method and number of nodes, at least 1; the seed sets the model, the skew and the order of
        the samples. Default 3.
    steps
        Iterations per run, for any number of nodes. Default 150.
    batch, alpha, optimizer, model, data
        As for `hpcsgd train`.
    learning_rate
        By name of the method, or with the key "" for all; the same for all numbers of nodes, with cosine
        decay. Default: the best of 0.03, 0.1 and 0.3 at 16 nodes for D-SGD and for teleport.
    out
        The folder of the study. Default "scale".

    Raises
    ------
    BadOption
        An option of the runs is out of its range, or `active` or `learning_rate` lacks a key.
    HpcsgdError
        On all ranks, if a run fails.
    """
    names = [registry.parse(method)[0] for method in methods]
    active_nodes = _by_key("active", active, list(map(str, nodes)))
    rates = _by_key("learning_rate", learning_rate, names)
    common = validate(
        Settings(
            data=data,
            model=model,
            optimizer=optimizer,
            batch=batch,
            alpha=alpha,
            uneven="stop",
            evaluate_every=0.0,
            checkpoint_every=0.0,
            log_every=steps,
            threads=1,
        )
    )
    grid = [(count, seed, method) for count in nodes for seed in range(seeds) for method in methods]
    source = load(data).train
    plan = []
    for count, seed, method in grid:
        rate = rates[registry.parse(method)[0]]
        settings = replace(common, virtual_nodes=count, seed=seed, learning_rate=rate)
        strategy = with_option(STRATEGIES, method, "active", active_nodes[str(count)])
        settings = validate(replace(settings, strategy=strategy))
        plan.append((f"{count}-{seed}-{method}", _with_length(steps, settings, source)))
    with World(device="cpu") as world:
        out = Path(out)
        output.check_writable(world, out / "scale.csv")
        finished = run_plan(world, out, plan)
        if world.rank == 0:
            trials = [ScaleTrial(*point, run) for point, run in zip(grid, finished, strict=True)]
            _check_length(trials, steps)
            title = f"{data}, Dirichlet({alpha:g}), {steps} iterations of batches of {batch}"
            study = ScaleStudy(
                trials, f"{title}, {seeds} seeds, virtual nodes on {output.describe_ranks(world)}"
            )
            study.show()
            output.write_csv(out / "scale.csv", study.rows(output.environment(world)))
            print(out / "scale.csv", study.plot(out), sep="\n", flush=True)


def _by_key(option: str, values: Mapping[str, T], keys: Sequence[str]) -> dict[str, T]:
    """Return the value of each key, or that of all."""
    keys = list(dict.fromkeys(keys))
    if "" not in values and (missing := [key for key in keys if key not in values]):
        raise BadOption(
            f"option {option} lacks {', '.join(missing)}",
            expected="one number, or for example " + ",".join(f"{key}=2" for key in keys),
            got=dict(values),
        )
    return {key: values[key] if key in values else values[""] for key in keys}


def _with_length(steps: int, settings: Settings, source: Source) -> Settings:
    """Set the epochs to `steps` steps: an epoch is the smallest shard, or if asynchronous the largest."""
    nodes = settings.virtual_nodes or 1
    shards = partition(source.labels, len(source), nodes, settings.alpha, settings.seed, 0)
    batches = [-(-len(shard) // settings.batch) for shard in shards]
    synchronous = build_strategy(settings.strategy).synchronous
    # A run takes as many steps as these epochs begin.
    return replace(settings, epochs=(steps - 0.5) / (min(batches) if synchronous else max(batches)))


def _check_length(trials: Sequence[ScaleTrial], steps: int) -> None:
    for trial in trials:
        got = int(trial.finished.record.test.step[-1])
        if got != steps:
            raise HpcsgdError(f"{trial.method} took a wrong number of steps", expected=steps, got=got)
