"""The step benchmark: all contenders train the same model, and each is timed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI

from hpcsgd import Run
from hpcsgd.commands.bench import step
from hpcsgd.commands.bench.options import StepOptions
from hpcsgd.commands.cli import cli
from hpcsgd.errors import HpcsgdError

pytestmark = pytest.mark.mpi

MODELS = ("logistic", "gpt:layers=1,width=16,heads=2")


def test_a_line_per_model_and_contender(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(MPI.COMM_WORLD.bcast(str(tmp_path)), "step.csv")
    step.main(StepOptions(MODELS, batch=2, repeats=2, steps=2, csv=path))
    MPI.COMM_WORLD.Barrier()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = ["hpcsgd", "DDP-gloo", "no communication"]
    assert [(r["model"], r["contender"]) for r in rows] == [(m, n) for m in MODELS for n in names]
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
    logistic = rows[0]
    assert int(logistic["gradient_bytes"]) == 4 * (3 * 32 * 32 + 1) * 10
    # One rank is plain training and holds no buffers; elsewhere they have only the padding to cache lines.
    needed = int(logistic["gradient_bytes"]) if MPI.COMM_WORLD.size > 1 else 0
    assert 0 <= int(logistic["buffer_bytes"]) - needed < 2 * 64
    assert ("DDP-gloo" in capfd.readouterr().out) == (MPI.COMM_WORLD.rank == 0)


def test_bfloat16_and_compression(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(MPI.COMM_WORLD.bcast(str(tmp_path)), "step.csv")
    options = {"dtype": "bfloat16", "context": 32, "compress": "maxnorm:bits=4"}
    step.main(StepOptions(MODELS, batch=2, repeats=1, steps=1, csv=path, **options))
    MPI.COMM_WORLD.Barrier()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["contender"] for r in rows][:2] == ["hpcsgd", "hpcsgd, maxnorm:bits=4"] and len(rows) == 8
    assert {(r["dtype"], r["device"]) for r in rows} == {("bfloat16", "cpu")}
    assert int(rows[0]["gradient_bytes"]) == 2 * (3 * 32 * 32 + 1) * 10
    for row, alone in ((rows[1], rows[3]), (rows[5], rows[7])):
        ratio = float(row["median_ms"]) / float(alone["median_ms"])
        assert float(row["times_no_communication"]) == pytest.approx(ratio, rel=1e-3)
        assert float(alone["times_no_communication"]) == 1
    assert ("bfloat16" in capfd.readouterr().out) == (MPI.COMM_WORLD.rank == 0)


def test_command_parses_models_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[StepOptions] = []
    monkeypatch.setattr(step, "main", called.append)
    words = [
        "--models",
        "resnet18,gpt:layers=14,heads=12,width=768,user.module:model:a=1",
        "--dtype",
        "bfloat16",
    ]
    cli(["bench", "step", *words], standalone_mode=False)
    assert called[0].models == ["resnet18", "gpt:layers=14,heads=12,width=768", "user.module:model:a=1"]
    assert (called[0].dtype, called[0].device, called[0].compress) == ("bfloat16", "cpu", None)


def test_diverging_training_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Run.step

    def wrong(self: Run, *arguments: Any) -> Any:
        for parameter in self.model.parameters():
            parameter.grad.mul_(3)
        return right(self, *arguments)

    monkeypatch.setattr(Run, "step", wrong)
    with pytest.raises(HpcsgdError, match="a step of logistic is wrong"):
        step.main(StepOptions(["logistic"], batch=2, repeats=1, steps=1))
    assert not torch.distributed.is_initialized()
