"""The benchmark of the start: one real job, whose parts are all timed and add up."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.support.launch import CLI, launch

PARTS = ["interpreter", "numpy", "torch", "mpi4py.MPI", "numba", "hpcsgd", "MPI_Init", "kernels", "World"]
PARTS += ["data, model, Run", "first step", "end", "sum"]
BARE = ["interpreter", "numpy", "torch", "mpi4py.MPI", "numba", "torch._dynamo", "end", "sum"]
# Imports that take seconds need not be repeated here.
LIGHT = """
from hpcsgd.commands.bench import startup
startup._BARE = startup._BARE.replace("__import__(name)", "pass")
"""


@pytest.mark.timeout(60)
def test_a_line_per_part(tmp_path: Path) -> None:
    job = launch(
        CLI + LIGHT + "main()", 2, "bench", "startup", "--csv", str(tmp_path / "startup.csv"), timeout=50
    )
    assert job.returncode == 0 and not job.left and not job.files, job
    assert job.stdout.count("times the bare imports") == 1, "rank 0 alone prints"
    with (tmp_path / "startup.csv").open() as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    assert [name for name, row in rows.items() if row["median_s"]] == PARTS
    assert [name for name, row in rows.items() if row["bare_median_s"]] == BARE
    for kind, names in (("", PARTS), ("bare_", BARE)):
        median, largest = ({n: float(rows[n][f"{kind}{of}_s"]) for n in names} for of in ("median", "max"))
        assert all(0 <= median[name] <= largest[name] for name in names)
    own = {name: float(rows[name]["max_s"]) for name in PARTS}
    assert own["end"] < own.pop("sum") <= sum(own.values()) + 1e-3
    assert rows["sum"]["ranks"] == "2" and own["World"] > 0


@pytest.mark.timeout(60)
def test_an_unwritable_file_is_one_message(tmp_path: Path) -> None:
    job = launch(CLI + LIGHT + "main()", 2, "bench", "startup", "--csv", str(tmp_path), timeout=50)
    assert job.returncode == 2 and job.stderr.count("cannot write") == 1, job
