"""The scale study: real runs with equally many iterations on any number of virtual nodes, and its results."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcsgd.commands.bench.studies import scale
from hpcsgd.commands.bench.studies.runner import FinishedRun
from hpcsgd.commands.bench.studies.scale import ScaleStudy, ScaleTrial
from hpcsgd.commands.report.run_reader import load
from hpcsgd.errors import BadOption
from tests.support.launch import CLI, launch

RING, TELEPORT, STEPS = "dsgd:topology=ring", "teleport:topology=ring", 7

# An error in a run stops the study; the same command continues with that run.
STOPPED = """
import contextlib, hpcsgd.commands.bench.studies.runner as study
from hpcsgd.mpi import launcher

trained, broken = [], True
class RecordingTraining(study.Trainer):
    def execute(self):
        trained.append(self.settings.name)
        if broken and trained[-1] == "8-0-dsgd:topology=ring":
            raise study.HpcsgdError("stopped", everywhere=True)
        return super().execute()

study.Trainer = RecordingTraining
with contextlib.suppress(SystemExit):
    main()
broken = False
trained.clear()
with contextlib.suppress(SystemExit):
    main()
if launcher.rank() == 0:
    print("again:", *trained, flush=True)
"""


@pytest.mark.long
@pytest.mark.timeout(170)
def test_a_study_of_real_runs(tmp_path: Path) -> None:
    words = f"--methods {RING};{TELEPORT} --nodes 4,8 --active 4=1,8=2 --seeds 1 --steps {STEPS} --batch 4"
    words += f" --learning-rate dsgd=0.1,teleport=0.05 --data synthetic:samples=128 --out {tmp_path}"
    job = launch(CLI + STOPPED, 1, "bench", "scale", *words.split(), timeout=120)
    assert job.returncode == 0 and not job.left and not job.files, job
    assert f"again: warm-up 8-0-{RING} warm-up 8-0-{TELEPORT}\n" in job.stdout, job
    runs = [f"{nodes}-0-{method}" for nodes in (4, 8) for method in (RING, TELEPORT)]
    assert (tmp_path / "scale.png").stat().st_size > 1000
    with (tmp_path / "scale.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [f"{r['virtual_nodes']}-{r['seed']}-{r['method']}" for r in rows] == runs
    assert [row["strategy"] for row in rows] == [RING, f"{TELEPORT},active=1", RING, f"{TELEPORT},active=2"]
    assert [float(row["learning_rate"]) for row in rows] == [0.1, 0.05] * 2
    for row, name in zip(rows, runs, strict=True):
        record = load(tmp_path / name)
        assert int(row["steps"]) == record.train.step[-1] == STEPS
        assert float(row["accuracy"]) == pytest.approx(record.test.accuracy[-1], abs=1e-6)
        assert record.config["virtual_nodes"] == int(row["virtual_nodes"])
    assert not list(tmp_path.glob("*/checkpoints")) and not (tmp_path / "warm-up").exists()


def study(accuracies: dict[int, list[float]]) -> ScaleStudy:
    trials = []
    for nodes, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            test = SimpleNamespace(
                accuracy=np.array([0.0, accuracy]), consensus_distance=np.array([9.0, 2.0])
            )
            record: Any = SimpleNamespace(test=test)
            trials.append(ScaleTrial(nodes, seed, "dsgd", FinishedRun(record, [1])))
    return ScaleStudy(trials, "nowhere")


def show(study: ScaleStudy) -> None:
    for table in study.tables():
        table.show()


def test_mean_and_deviation_of_the_last_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    show(study({16: [0.9, 0.94], 8: [0.8, 0.8]}))
    printed = capsys.readouterr().out
    assert printed.index("8") < printed.index("16")
    assert "80.0 ± 0.0" in printed and "92.0 ± 2.8" in printed and "2 ± 0" in printed
    show(study({8: [0.5]}))
    assert "±" not in capsys.readouterr().out


def test_mapping_is_one_value_or_one_per_key() -> None:
    assert scale._by_key("active", {"": 4}, ["8", "16"]) == {"8": 4, "16": 4}
    assert scale._by_key("active", {"8": 2, "16": 4, "32": 8}, ["8", "16", "8"]) == {"8": 2, "16": 4}
    with pytest.raises(BadOption, match=r"lacks 16.*8=2,16=2"):
        scale._by_key("active", {"8": 2}, ["8", "16"])
