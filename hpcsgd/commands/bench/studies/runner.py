"""Many training runs in one job, one after the other; what is complete is not run again."""

from __future__ import annotations

import inspect
import json
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcsgd import registry
from hpcsgd.commands.bench.studies.subworlds import parts_of, ranks_of
from hpcsgd.commands.report import RunRecord, load
from hpcsgd.commands.train.metrics import FILE
from hpcsgd.commands.train.settings import Settings, to_toml
from hpcsgd.commands.train.trainer import Training
from hpcsgd.errors import BadOption, HpcsgdError
from hpcsgd.mpi.world import World

_ROUNDING = 1e-6  # of epochs in the records
_ONE_STEP = 1e-9  # of an epoch


@dataclass(frozen=True)
class Finished:
    """A run that is over.

    Attributes
    ----------
    record
        What is in its folder.
    gradients
        How many each rank has computed, (ranks,).
    """

    record: RunRecord
    gradients: list[int]


def carry_out(world: World, out: Path, plan: Sequence[tuple[str, Settings]]) -> list[Finished]:
    """Train each of the plan's runs in turn; collective.

    A run that is complete in `out` is read instead, so that a study which was stopped goes on with the
    same command. A method first takes one step that is thrown away: what is compiled then is not timed.
    Where some methods have servers, the last ranks have no part in the runs of the others.

    Parameters
    ----------
    world
        The ranks.
    out
        Where the runs' folders are made.
    plan
        A name, which becomes the folder's, and the settings of each run.

    Returns
    -------
    list of Finished
        In the plan's order, on rank 0; nothing on the other ranks.

    Raises
    ------
    BadOption
        Where `out` holds a run of the same name with other settings.
    HpcsgdError
        On all ranks, where a run fails or the job is told to stop.
    """
    done: list[Finished] = []
    warm: set[str] = set()
    ranks = ranks_of([settings.strategy for _, settings in plan], world.size)
    with parts_of(world, [*ranks.values()]) as parts:
        for number, (name, settings) in enumerate(plan, 1):
            settings = _carried_out(settings, out, name)
            part = parts[ranks[settings.strategy]]
            told = world.together(lambda: world.rank == 0 and _is_complete(part, out / name, settings))  # noqa: B023
            if not world.gather(told)[0] and world.rank < ranks[settings.strategy]:
                if settings.strategy not in warm:
                    _train(
                        part, replace(settings, name="warm-up", epochs=_ONE_STEP, delays="none"), keep=False
                    )
                    warm.add(settings.strategy)
                _train(part, settings)
            if world.rank == 0:
                done.append(_read(out / name))
                _tell(f"{number}/{len(plan)} {name}", done[-1])
    return done


def _tell(name: str, finished: Finished) -> None:
    test = finished.record.test
    print(
        f"{name}: {test.step[-1]} iterations in {test.time[-1]:.1f} s, accuracy {test.accuracy[-1]:.1%}",
        flush=True,
    )


def find(out: Path, name: str, settings: Settings, ranks: int) -> Finished | None:
    """A run that is complete, of these settings and of so many ranks, on whatever nodes; if there is one."""
    folder = out / name
    before = _config(folder)
    about = {"ranks": ranks, "nodes": before.get("world", {}).get("nodes", 1)}
    settings = _carried_out(settings, out, name)
    same = bool(before) and not _differences(before, settings, about)
    return _read(folder) if same and _has_ended(folder, settings) else None


def check_each_once(what: str, *options: Sequence[object]) -> None:
    """Raise where the first of some lists is empty, or one names something twice."""
    if not options[0] or any(len({*listed}) < len(listed) for listed in options):
        got = [value for listed in options for value in listed]
        raise BadOption(what, expected="one or more, each once", got=got)


def with_option(rows: Mapping[str, Callable[..., object]], spec: str, key: str, value: object) -> str:
    """The spec with an option more, where its row has that option and the spec does not set it."""
    name, options = registry.parse(spec)
    if name not in rows or key in options or key not in inspect.signature(rows[name]).parameters:
        return spec
    return f"{spec}{',' if options else ':'}{key}={value}"


def _train(world: World, settings: Settings, *, keep: bool = True) -> None:
    folder = Path(settings.out) / settings.name
    training = world.together(lambda: Training(settings, world))
    if world.rank == 0 and not keep:
        shutil.rmtree(folder, ignore_errors=True)
    training.execute()
    if training.step < training.total:
        raise HpcsgdError(
            f"told to stop in run {settings.name}", do="the same command goes on from there", everywhere=True
        )
    if world.rank == 0:
        # Of dozens of runs they would fill the disk.
        shutil.rmtree(folder / "checkpoints" if keep else folder)


def _carried_out(settings: Settings, out: Path, name: str) -> Settings:
    return replace(settings, out=str(out), name=name, progress="off")


def _is_complete(world: World, folder: Path, settings: Settings) -> bool:
    """Whether it is; what is left of a run that is not gets removed."""
    before = _config(folder)
    odd = _differences(before, settings, {"ranks": world.size, "nodes": world.nodes}) if before else {}
    for key, (expected, got) in odd.items():
        raise BadOption(
            f"{folder} is a run with another {key}",
            expected=expected,
            got=got,
            do="name another folder, or remove this one",
        )
    if _has_ended(folder, settings):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _config(folder: Path) -> dict[str, Any]:
    """The settings of a run; empty where there is none."""
    try:
        return tomllib.loads((folder / "config.toml").read_text())
    except FileNotFoundError:
        return {}


def _differences(
    before: Mapping[str, Any], settings: Settings, about: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """What the settings say, and what the run's folder does, where these differ."""
    wanted = tomllib.loads(to_toml(settings, about))
    odd = [key for key in wanted if key != "out" and before.get(key) != wanted[key]]
    return {key: (wanted[key], before.get(key)) for key in odd}


def _has_ended(folder: Path, settings: Settings) -> bool:
    last = _last(folder)
    return last is not None and last["epoch"] >= settings.epochs - _ROUNDING


def _read(folder: Path) -> Finished:
    last = _last(folder)
    assert last is not None, "only complete runs are read"
    return Finished(load(folder), last["gradients"])


def _last(folder: Path) -> dict[str, Any] | None:
    """The last evaluation in a run's metrics."""
    if not (folder / FILE).exists():
        return None
    lines = [line for line in (folder / FILE).read_text().splitlines() if line.endswith("}")]
    tests = [record for record in map(json.loads, lines) if record["event"] == "test"]
    return tests[-1] if tests else None
