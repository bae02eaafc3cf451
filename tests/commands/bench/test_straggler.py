"""The straggler study: real runs in one job, which a second call reads instead, and its results."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcsgd.commands.bench.output import Results
from hpcsgd.commands.bench.studies import runner
from hpcsgd.commands.bench.studies.runner import FinishedRun, with_option
from hpcsgd.commands.bench.studies.straggler import StragglerStudy, StragglerTrial
from hpcsgd.commands.train.settings import Settings, to_toml
from hpcsgd.errors import BadOption
from hpcsgd.strategies import STRATEGIES
from hpcsgd.strategies.delays import DELAYS
from tests.support.launch import CLI, launch

FULL, DYNAMIC = "backup:backups=0", "backup"
SLOW, EQUAL = "slow:seconds=0.02", "constant:seconds=0.001"


def printed_by(script: str, out: Path, *words: str) -> str:
    """The output of `script`, which runs `hpcsgd bench straggler` in a job of two ranks."""
    options = (
        f"--methods allreduce;{FULL} --delays {SLOW};{EQUAL} --seeds 2 --epochs 2 --data synthetic:samples=64"
    )
    full = ["bench", "straggler", *options.split(), "--out", str(out), *words]
    job = launch(CLI + script, 2, *full, timeout=120)
    assert job.returncode == 0 and not job.left and not job.files, job
    return job.stdout


# The second call fails if it trains anything.
TWICE = """
import contextlib, hpcsgd.commands.bench.studies.runner as study
with contextlib.suppress(SystemExit):
    main()
study.Trainer = None
main()
"""


@pytest.mark.long
@pytest.mark.timeout(170)
def test_a_study_of_real_runs(tmp_path: Path) -> None:
    printed = printed_by(TWICE, tmp_path)
    runs = [
        f"{delay}-{seed}-{method}"
        for delay in (SLOW, EQUAL)
        for seed in (0, 1)
        for method in ("allreduce", FULL)
    ]
    assert re.findall(r"^\d/8 (\S+): \d+ iterations", printed, re.MULTILINE) == 2 * runs
    assert "simulated" in printed and (tmp_path / "straggler.png").stat().st_size > 1000
    with (tmp_path / "straggler.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [f"{r['simulated_delays']}-{r['seed']}-{r['method']}" for r in rows] == runs
    for row in rows:
        iterations = int(row["iterations"])
        assert [int(row[f"{most}_gradients"]) for most in ("fewest", "most")] == [iterations] * 2
        # All wait for the slow rank, which sleeps four times 20 ms a gradient.
        assert (float(row["ms_per_iteration"]) > 80) == (row["simulated_delays"] == SLOW)
    assert {path.name for path in tmp_path.iterdir()} == {*runs, "straggler.csv", "straggler.png"}
    assert not list(tmp_path.glob("*/checkpoints"))


def write_run_folder(folder: Path, settings: Settings, *epochs: float) -> None:
    """Write the folder of a run on one rank."""
    folder.mkdir()
    (folder / "config.toml").write_text(to_toml(settings, {"ranks": 1, "nodes": 1}))
    lines = [json.dumps({"event": "test", "epoch": epoch}) for epoch in epochs]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "te']))


def test_only_a_complete_run_of_the_same_settings_counts(tmp_path: Path) -> None:
    world: Any = SimpleNamespace(size=1, nodes=1)
    settings, folder = Settings(epochs=2.5, out="here", name="run"), tmp_path / "run"
    assert not runner._is_complete(world, folder, settings)
    write_run_folder(folder, settings, 1.0, 2.5)
    assert runner._is_complete(world, folder, replace(settings, out="there"))
    with pytest.raises(BadOption, match="another seed"):
        runner._is_complete(world, folder, replace(settings, seed=1))
    with pytest.raises(BadOption, match="another world"):
        runner._is_complete(SimpleNamespace(size=2, nodes=1), folder, settings)  # type: ignore[arg-type]
    shutil.rmtree(folder)
    write_run_folder(folder, settings, 1.0, 2.4)
    assert not runner._is_complete(world, folder, settings) and not folder.exists()


def trial(delay: str, method: str, seed: int, times: list[float], accuracies: list[float]) -> StragglerTrial:
    steps = 10 * np.arange(1, len(times) + 1)
    test = SimpleNamespace(time=np.array(times), accuracy=np.array(accuracies), step=steps)
    record: Any = SimpleNamespace(test=test)
    return StragglerTrial(delay, seed, method, FinishedRun(record, [10 + seed, 20 + seed]), 0.9)


def small_study(dynamic_seconds: float) -> StragglerStudy:
    trials = [
        trial("slow:factor=4", method, seed, [scale * t for t in times], accuracies)
        for method, scale in ((FULL, 1.0), (DYNAMIC, dynamic_seconds), ("dsgd", 0.9))
        for seed, (times, accuracies) in enumerate(
            [([1.0, 2.0], [0.5, 0.95]), ([2.0, 4.0], [0.95, 0.8]), ([3.0, 6.0], [0.5, 0.6])]
        )
    ]
    return StragglerStudy(trials, "nowhere")


def test_medians_over_the_seeds() -> None:
    study = small_study(0.5)
    found = study.runs("slow:factor=4", FULL)
    assert (found.seconds, found.median(lambda trial: trial.accuracy)) == (4.0 / 20, 0.8)
    # Reached after 20 iterations in 2 s, after 10 in 2 s, and never.
    assert found.reached == (20, 2.0)
    (table,) = study.tables()
    cells = {runs.method: [column.text(runs) for column in table.columns] for runs in table.results}
    assert cells[FULL] == [FULL, "200.0", "20", "2.00", "1.00", "80.0%", "11..21"]
    assert cells[DYNAMIC][4] == "0.50"
    assert found.gradients == (11, 21)


def test_a_target_that_is_not_reached_is_never() -> None:
    study = StragglerStudy([trial("slow", DYNAMIC, 0, [1.0], [0.5])], "")
    (table,) = study.tables()
    assert [column.text(table.results[0]) for column in table.columns][2:5] == ["never", "never", ""]
    (row,) = Results(study.columns(), study.trials).rows({"cores": 2})
    assert (row["iterations_to_target"], row["seconds_to_target"], row["cores"]) == ("", "", 2)


def test_option_is_added_if_it_exists_and_is_unset() -> None:
    assert with_option(STRATEGIES, "dsgd", "topology", "ring") == "dsgd:topology=ring"
    assert with_option(STRATEGIES, "dsgd:overlap=yes", "topology", "ring") == "dsgd:overlap=yes,topology=ring"
    assert with_option(STRATEGIES, "dsgd:topology=star", "topology", "ring") == "dsgd:topology=star"
    assert with_option(STRATEGIES, "allreduce", "topology", "ring") == "allreduce"
    assert with_option(DELAYS, "exponential:mean=2", "seed", 3) == "exponential:mean=2,seed=3"
