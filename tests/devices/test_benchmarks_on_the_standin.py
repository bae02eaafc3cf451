"""The benchmarks' paths for a GPU on the stand-in: results that are checked there, and a line per method."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from torch import Tensor

from hpcsgd import World
from hpcsgd.commands.bench import baselines, devices, step
from hpcsgd.commands.bench.allreduce import command
from hpcsgd.commands.bench.options import AllReduceOptions, StepOptions

pytestmark = [pytest.mark.standin, pytest.mark.mpi(min_size=2)]

COPY_SECONDS = 1e-3


@pytest.fixture(autouse=True)
def standin_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let benchmarks take the stand-in, which has neither a clock nor gloo."""
    monkeypatch.setattr(devices, "time_copy", lambda *_: np.full(3, COPY_SECONDS))
    monkeypatch.setattr(command, "_COPIED_BYTES", 2**20)
    right = baselines.gloo_mean

    def through_the_host(flat: Tensor) -> None:
        host = flat.to("cpu")
        right(host)
        flat.copy_(host)

    monkeypatch.setattr(baselines, "gloo_mean", through_the_host)


def rows_of(path: Path) -> list[dict[str, str]]:
    MPI.COMM_WORLD.Barrier()
    with path.open() as file:
        return list(csv.DictReader(file))


def test_allreduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[str | None] = []
    right = World

    def world(**options: Any) -> Any:
        settings.append(os.environ.get("HPCSGD_DEVICE_WINDOWS"))
        return right(**options)

    for module in (command, devices):
        monkeypatch.setattr(module, "World", world)
    path = Path(MPI.COMM_WORLD.bcast(str(tmp_path)), "allreduce.csv")
    options = AllReduceOptions([4, 300_000 / 1024], repeats=1, csv=path, device="standin")  # type: ignore[arg-type]
    command.main(options)
    rows = rows_of(path)
    methods = ["hpcsgd", "hpcsgd staged", "hpcsgd with copy", "gloo", "memory copy"]
    assert [r["method"] for r in rows] == [*methods, *methods, "copy by one rank"]
    assert settings == [None, "0"], "one world without windows"
    # Of each rank's row every byte is read once and written once, at the bandwidth of the copy.
    limit = MPI.COMM_WORLD.size * 300_000 / 2**20 * 1e3 * COPY_SECONDS
    for row, passes in zip(rows[5:9], (1, 1, 2, 1), strict=True):
        expected = passes * limit / float(row["median_ms"])
        assert float(row["share_of_limit"]) == pytest.approx(expected, rel=0.02, abs=1e-4)


def test_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # DDP has no backend for the stand-in: plain training takes its place, with one rank's gradients.
    monkeypatch.setattr(step, "DistributedDataParallel", lambda model: model)
    monkeypatch.setattr(step, "check_equal", lambda *_: None)
    path = Path(MPI.COMM_WORLD.bcast(str(tmp_path)), "step.csv")
    options: Any = {"device": "standin", "compress": "maxnorm:bits=4"}
    step.main(StepOptions(["logistic"], batch=2, repeats=2, steps=2, csv=path, **options))
    rows = rows_of(path)
    assert [r["contender"] for r in rows][:2] == ["hpcsgd", "hpcsgd, maxnorm:bits=4"]
    assert {r["device"] for r in rows} == {"standin"}
