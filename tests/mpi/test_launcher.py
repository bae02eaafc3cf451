"""Rank and size from the environment variables of each launcher."""

from __future__ import annotations

import pytest

from hpcsgd.mpi import launcher

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
