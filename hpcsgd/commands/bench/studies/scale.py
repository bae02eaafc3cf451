"""`hpcsgd bench scale`: accuracy of gossip methods against the number of nodes, on skewed data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from hpcsgd import registry
from hpcsgd.commands.bench import output
from hpcsgd.commands.bench.studies.runner import carry_out, check_each_once, with_option
from hpcsgd.commands.bench.studies.scale_results import Study, Trial
from hpcsgd.commands.bench.timing import check_positive
from hpcsgd.commands.train.settings import Settings, validate
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.strategies import STRATEGIES
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
#: The best of 0.03, 0.1 and 0.3 at 16 nodes.
RATES = "dsgd=0.3,teleport=0.1"


def main(
    methods: Sequence[str] = METHODS,
    nodes: Sequence[int] = NODES,
    active: str = "4",
    seeds: int = 3,
    steps: int = 150,
    batch: int = 8,
    alpha: float = 0.1,
    learning_rate: str = RATES,
    optimizer: str = "sgd:momentum=0.9",
    model: str = "2nn:width=64",
    data: str = "digits",
    out: str | Path = "scale",
) -> None:
    """Train on more and more virtual nodes on the ranks of this job; rank 0 prints a table.

    Every node whose turn it is takes a batch of its own in every iteration, and shuffles its samples anew
    when the node with the fewest is through with them (`--uneven stop`). In `out` are the runs,
    `scale.csv`, and `scale.png`, accuracy against nodes. A study that was stopped goes on with the same
    command.

    Parameters
    ----------
    methods
        Strategies, as of `hpcsgd train --strategy`.
    nodes
        Numbers of virtual nodes, multiples of the ranks. Default 8, 16, 32, 64.
    active
        Of teleport, which does not name it: a number for all, or NODES=ACTIVE with commas between: as
        `hpcsgd tune teleportation` finds them. Default 4.
    seeds
        Runs of each, at least 1: of the model, the skew and all else. Default 3.
    steps
        Iterations of every run, whatever the number of nodes. Default 150.
    batch, alpha, optimizer, model, data
        As of `hpcsgd train`.
    learning_rate
        A number for all methods, or NAME=RATE with commas between; the same for all numbers of nodes. Its
        course is a cosine. Default: the best of 0.03, 0.1 and 0.3 at 16 nodes, of D-SGD and of teleport.
    out
        A folder. Default "scale".

    Raises
    ------
    BadOption
        An option out of its range, or a method that does not exist.
    HpcsgdError
        On all ranks, where a run fails.
    """
    check_positive("nodes, seeds and steps", [*nodes, seeds, steps])
    check_each_once("methods and nodes", methods, nodes)
    names = {registry.parse(method)[0] for method in methods}
    most_active = _each("active", active, {str(count) for count in nodes}, int)
    rates = _each("learning_rate", learning_rate, names, float)
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
    asked = [(count, seed, method) for count in nodes for seed in range(seeds) for method in methods]
    source = load(data).train
    plan = []
    for count, seed, method in asked:
        rate = rates[registry.parse(method)[0]]
        settings = replace(common, virtual_nodes=count, seed=seed, learning_rate=rate)
        strategy = with_option(STRATEGIES, method, "active", most_active[str(count)])
        planned = validate(replace(settings, strategy=strategy))
        plan.append((f"{count}-{seed}-{method}", _of_length(steps, planned, source)))
    with World(device="cpu") as world:
        out = Path(out)
        output.check_writable(world, out / "scale.csv")
        done = carry_out(world, out, plan)
        if world.rank == 0:
            trials = [Trial(*one, finished) for one, finished in zip(asked, done, strict=True)]
            _check_length(trials, steps)
            title = f"{data}, Dirichlet({alpha:g}), {steps} iterations of batches of {batch}"
            study = Study(trials, f"{title}, {seeds} seeds, virtual nodes on {output.layout(world)}")
            study.show()
            output.write_csv(out / "scale.csv", study.rows(output.facts(world)))
            print(out / "scale.csv", study.plot(out), sep="\n", flush=True)


def _each(option: str, text: str, keys: Iterable[str], kind: Callable[[str], T]) -> dict[str, T]:
    """What a text gives to each key: one value for all, or KEY=VALUE with commas between."""
    keys = list(keys)
    pairs = [part.partition("=") for part in text.split(",")]
    given = {key.strip(): value for key, equals, value in pairs if equals} or dict.fromkeys(keys, text)
    try:
        return {key: kind(given[key]) for key in keys}
    except (KeyError, ValueError):
        expected = "one number, or for example " + ",".join(f"{key}=2" for key in keys)
        raise BadOption(option, expected=expected, got=repr(text)) from None


def _of_length(steps: int, settings: Settings, source: Source) -> Settings:
    """Settings give a length in epochs, which end with the smallest shard, or, out of step, the largest."""
    nodes = settings.virtual_nodes or 1
    shards = partition(source.labels, len(source), nodes, settings.alpha, settings.seed, 0)
    batches = [-(-len(shard) // settings.batch) for shard in shards]
    lockstep = registry.build(STRATEGIES, settings.strategy, "strategy").lockstep
    # A run takes as many steps as these epochs begin.
    return replace(settings, epochs=(steps - 0.5) / (min(batches) if lockstep else max(batches)))


def _check_length(trials: Sequence[Trial], steps: int) -> None:
    for trial in trials:
        taken = int(trial.finished.record.test.step[-1])
        if taken != steps:
            raise HpcsgdError(f"{trial.method} took another number of steps", expected=steps, got=taken)
