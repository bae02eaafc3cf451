"""The all-reduce benchmark: every method runs once, with a correct result and a line in the CSV file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from hpcsgd import World, collectives
from hpcsgd.commands.bench import baselines
from hpcsgd.commands.bench.allreduce import command
from hpcsgd.commands.bench.options import AllReduceOptions
from hpcsgd.errors import HpcsgdError

pytestmark = pytest.mark.mpi

SIZES = (4096, 300_000)


def shared_path(tmp_path: Path) -> Path:
    """The path of rank 0, on all ranks."""
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path)), "results", "allreduce.csv")


def test_a_line_per_size_and_method(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = shared_path(tmp_path)
    command.main(AllReduceOptions([size / 1024 for size in SIZES], repeats=1, csv=path))
    MPI.COMM_WORLD.Barrier()
    with path.open() as file:
        rows = list(csv.DictReader(file))
    methods = ["hpcsgd", "hpcsgd with copy", "MPI", "gloo", "memory copy"]
    assert [(int(r["bytes"]), r["method"]) for r in rows] == [(s, m) for s in SIZES for m in methods]
    for row in rows:
        assert 0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"])
        assert (int(row["ranks"]), int(row["nodes"])) == (MPI.COMM_WORLD.size, 1)
        assert row["torch"] == torch.__version__ and row["mpi"] and row["device"] == "cpu"
    # Copies of gradients into buckets are bytes that a method must move too.
    for passes, method in enumerate(methods[:2], start=1):
        row, copied = (
            next(r for r in rows if (int(r["bytes"]), r["method"]) == (SIZES[1], m))
            for m in (method, "memory copy")
        )
        expected = passes * float(copied["median_ms"]) / float(row["median_ms"])
        assert float(row["share_of_limit"]) == pytest.approx(expected, rel=0.02)
    printed = capfd.readouterr().out
    assert ("4 KiB" in printed) == (MPI.COMM_WORLD.rank == 0)


def test_wrong_mean_raises_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = baselines.mpi_mean

    def wrong(comm: Any, flat: Tensor) -> None:
        right(comm, flat)
        flat[-1] += 1

    monkeypatch.setattr(baselines, "mpi_mean", wrong)
    with pytest.raises(HpcsgdError, match="MPI for 4096 bytes is wrong"):
        command.main(AllReduceOptions([4], repeats=1))


def test_algorithm_option_selects_the_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    ring = collectives.ALGORITHMS["ring"]

    def noted(bucket: Any, scale: float) -> Any:
        used.append(bucket.nbytes)
        return ring(bucket, scale)

    monkeypatch.setitem(collectives.ALGORITHMS, "ring", noted)
    command.main(AllReduceOptions([256], repeats=1, algorithm="ring"))
    # The buffers one by one, and with the copy all of them in one bucket of the default size.
    assert set(used) == ({2**18, 4 * 2**18} if MPI.COMM_WORLD.size > 1 else set())


def test_unwritable_csv_raises_on_all_ranks_before_measuring(tmp_path: Path) -> None:
    folder = Path(MPI.COMM_WORLD.bcast(str(tmp_path)))
    with pytest.raises(HpcsgdError, match="cannot write"):
        command.main(AllReduceOptions([4], repeats=1, csv=folder))


def test_gloo_context_restores_torch_distributed() -> None:
    for _ in range(2):
        with World() as world, baselines.gloo(world):
            flat = torch.full((3,), float(world.rank))
            baselines.gloo_mean(flat)
            assert flat.tolist() == [(world.size - 1) / 2] * 3
        assert not torch.distributed.is_initialized()
