"""Rank and size from the environment variables of each launcher."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcsgd.errors import HpcsgdError
from hpcsgd.mpi import launcher
from hpcsgd.mpi.environment import check_launcher, cpu_quota, share_of_cores

VARIABLES = [
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "PMIX_RANK",
    "MPI_LOCALNRANKS",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
]


@pytest.mark.parametrize(
    ("environment", "rank", "size"),
    [
        ({}, 0, ("", 0)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, 3, ("PMI_SIZE", 4)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 1, ("OMPI_COMM_WORLD_SIZE", 2)),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"}, 5, ("SLURM_STEP_NUM_TASKS", 8)),
        # mpiexec inside a batch job: the batch script itself is Slurm's task 0 of 1.
        (
            {"PMI_RANK": "2", "PMI_SIZE": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
            2,
            ("PMI_SIZE", 4),
        ),
        ({"PMI_RANK": "", "SLURM_PROCID": "1"}, 1, ("", 0)),
        ({"PMI_RANK": "none", "PMI_SIZE": "-1"}, 0, ("", 0)),
    ],
)
def test_rank_and_size(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int, size: tuple[str, int]
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.rank() == rank
    found = launcher.size()
    assert found[1] == size[1] and (not size[1] or found == size)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, 2),
        ({"WORLD_SIZE": "3", "RANK": "1", "LOCAL_RANK": "1"}, 3),
        ({"WORLD_SIZE": "2"}, 0),  # may mean something else
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, 1),
    ],
)
def test_processes_that_torchrun_has_started_are_no_ranks(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], count: int
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launcher.other_launcher()[1] == count
    alone = SimpleNamespace(COMM_WORLD=SimpleNamespace(size=1), Get_library_version=lambda: "MPI")
    if count > 1:
        with pytest.raises(HpcsgdError, match=rf"mpiexec -n {count} python"):
            check_launcher(alone)
    else:
        check_launcher(alone)
    check_launcher(SimpleNamespace(COMM_WORLD=SimpleNamespace(size=2)))


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 0.5),
        ("0::/of/the/host", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/a", {"a/cpu.max": "max 100000"}, math.inf),
        (
            "4:memory:/m\n1:cpu,cpuacct:/x",
            {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
        ("", {}, math.inf),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, groups: str, files: dict[str, str], quota: float) -> None:
    (tmp_path / "groups").write_text(groups + "\n" if groups else "")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "root") == quota
    assert cpu_quota(tmp_path / "missing", tmp_path / "root") == math.inf


def test_a_quota_counts_as_cores() -> None:
    cores = set(range(8))
    assert share_of_cores(cores, [cores] * 2)[0] == 4
    assert share_of_cores(cores, [cores] * 2, 2.5)[0] == 1
    assert share_of_cores(cores, [cores] * 2, 0.5)[0] == 1
    assert share_of_cores(cores, [cores] * 2, 2.5) == share_of_cores({0, 1}, [{0, 1}] * 2)
    assert share_of_cores(cores, [cores] * 4, 2.5)[1] == share_of_cores({0, 1}, [{0, 1}] * 4)[1]
