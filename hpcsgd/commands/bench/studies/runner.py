"""Runs the training runs of a study one after the other in one job; complete runs are not repeated."""

from __future__ import annotations

import inspect
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcsgd import registry
from hpcsgd.commands.report.records import RunRecord
from hpcsgd.commands.report.run_reader import load
from hpcsgd.commands.train.metrics import FILE
from hpcsgd.commands.train.settings import FIELDS, Settings, to_toml, validate
from hpcsgd.commands.train.trainer import Trainer
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World
from hpcsgd.strategies import build

_ROUNDING = 1e-6  # of epochs in the records
_ONE_STEP = 1e-9  # of an epoch


@dataclass(frozen=True)
class FinishedRun:
    """A complete run: its settings and records, and the number of gradients of each rank, (ranks,)."""

    record: RunRecord
    gradients: list[int]


def run_plan(world: World, out: Path, plan: Sequence[tuple[str, Settings]]) -> list[FinishedRun]:
    """Train the runs of a plan one after the other; collective.

    A run that is complete in `out` is read instead, so that an interrupted study continues with the same
    command. Each method first takes one step in a run that is discarded, so that compilation is not timed.
    Where some methods have servers, the last ranks take no part in the runs of the other methods.

    The plan has the name, which is also that of the folder in `out`, and the settings of each run. The result
    is in this order on rank 0, and empty on the other ranks.

    Raises
    ------
    BadOption
        `out` holds a run of the same name with other settings.
    HpcsgdError
        On all ranks, if a run fails or the job is interrupted by a signal.
    """
    finished: list[FinishedRun] = []
    warm: set[str] = set()
    ranks = ranks_per_method([settings.strategy for _, settings in plan], world.size)
    with split_worlds(world, [*ranks.values()]) as subworlds:
        for number, (name, settings) in enumerate(plan, 1):
            settings = _in_folder(settings, out, name)
            subworld = subworlds[ranks[settings.strategy]]
            complete = world.collectively(
                lambda: world.rank == 0 and _is_complete(subworld, out / name, settings)  # noqa: B023
            )
            if not world.gather(complete)[0] and world.rank < ranks[settings.strategy]:
                if settings.strategy not in warm:
                    one_step = replace(settings, name="warm-up", epochs=_ONE_STEP, delays="none")
                    _train(subworld, one_step, discard=True)
                    warm.add(settings.strategy)
                _train(subworld, settings)
            if world.rank == 0:
                finished.append(_read_run(out / name))
                steps, seconds = finished[-1].record.test.step[-1], finished[-1].record.test.time[-1]
                accuracy = f"accuracy {finished[-1].record.test.accuracy[-1]:.1%}"
                done = f"{number}/{len(plan)} {name}: {steps} iterations in {seconds:.1f} s, {accuracy}"
                print(done, flush=True)
    return finished


def settings_of(options: Any, **more: Any) -> Settings:
    """The settings in `more`, those of which `options` has an attribute with that name, and the defaults."""
    names = (FIELDS.keys() & vars(options).keys()) - {"out", *more}
    return validate(Settings(**{name: getattr(options, name) for name in names}, **more))


def find_finished(out: Path, name: str, settings: Settings, ranks: int) -> FinishedRun | None:
    """The complete run with this name, these settings and `ranks` ranks on any nodes, if there is one."""
    folder = out / name
    config = _read_config(folder)
    job = {"ranks": ranks, "nodes": config.get("world", {}).get("nodes", 1)}
    settings = _in_folder(settings, out, name)
    same = bool(config) and not _differences(config, settings, job)
    return _read_run(folder) if same and _is_finished(folder, settings) else None


def with_option(rows: Mapping[str, Callable[..., object]], spec: str, key: str, value: object) -> str:
    """Add an option to a spec, if its registry row has the option and the spec does not set it."""
    name, options = registry.parse(spec)
    if name not in rows or key in options or key not in inspect.signature(rows[name]).parameters:
        return spec
    return f"{spec}{',' if options else ':'}{key}={value}"


def _train(world: World, settings: Settings, *, discard: bool = False) -> None:
    folder = Path(settings.out) / settings.name
    trainer = world.collectively(lambda: Trainer(settings, world))
    if world.rank == 0 and discard:
        shutil.rmtree(folder, ignore_errors=True)
    trainer.execute()
    if not trainer.completed:
        raise HpcsgdError(
            f"interrupted by a signal in run {settings.name}",
            do="run the same command again: it keeps the complete runs and repeats this one",
            everywhere=True,
        )
    if world.rank == 0:
        # The checkpoints of dozens of runs would fill the disk.
        shutil.rmtree(folder if discard else folder / "checkpoints")


def _in_folder(settings: Settings, out: Path, name: str) -> Settings:
    return replace(settings, out=str(out), name=name, progress="off")


def _is_complete(world: World, folder: Path, settings: Settings) -> bool:
    """Whether the run is complete; an incomplete run is removed."""
    config = _read_config(folder)
    job = {"ranks": world.size, "nodes": world.nodes}
    differences = _differences(config, settings, job) if config else {}
    for key, (expected, got) in differences.items():
        raise BadOption(
            f"{folder} holds a run with another {key}",
            expected=expected,
            got=got,
            do="give --out another folder, or remove this folder",
        )
    if _is_finished(folder, settings):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _read_config(folder: Path) -> dict[str, Any]:
    """The settings of a run, without its id; empty if there is no run."""
    try:
        config = tomllib.loads((folder / "config.toml").read_text())
    except FileNotFoundError:
        return {}
    config.get("world", {}).pop("run", None)
    return config


def _differences(
    config: Mapping[str, Any], settings: Settings, job: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """The value in `settings` and that in the run's `config`, for each key in which these differ."""
    expected = tomllib.loads(to_toml(settings, job))
    differing = [key for key in expected if key != "out" and config.get(key) != expected[key]]
    return {key: (expected[key], config.get(key)) for key in differing}


def _is_finished(folder: Path, settings: Settings) -> bool:
    last = _last_evaluation(folder)
    return last is not None and last["epoch"] >= settings.epochs - _ROUNDING


def _read_run(folder: Path) -> FinishedRun:
    last = _last_evaluation(folder)
    assert last is not None, "the run is complete"
    return FinishedRun(load(folder), last["gradients"])


def _last_evaluation(folder: Path) -> dict[str, Any] | None:
    """The last evaluation record in a run's metrics."""
    if not (folder / FILE).exists():
        return None
    lines = [line for line in (folder / FILE).read_text().splitlines() if line.endswith("}")]
    tests = [record for record in map(json.loads, lines) if record["event"] == "test"]
    return tests[-1] if tests else None


def ranks_per_method(methods: Sequence[str], ranks: int) -> dict[str, int]:
    """The number of ranks of each strategy with which all have equally many workers, as many as possible."""
    strategies = {method: build(method) for method in methods}
    workers = min(strategy.workers(ranks) for strategy in strategies.values())
    return {
        method: next(count for count in range(workers, ranks + 1) if strategy.workers(count) == workers)
        for method, strategy in strategies.items()
    }


@contextmanager
def split_worlds(world: World, counts: Sequence[int]) -> Iterator[Mapping[int, World]]:
    """Context with a world of the first `count` ranks for each of `counts`; collective.

    The remaining ranks get a world of their own, which is unused.
    """
    subworlds = {
        count: world if count == world.size else world.split(int(world.rank >= count))
        for count in dict.fromkeys(counts)
    }
    yield subworlds
    for subworld in subworlds.values():
        if subworld is not world:
            subworld.close()
