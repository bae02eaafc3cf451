"""What the launcher of this process (mpiexec, srun) says in the environment, before MPI is up."""

from __future__ import annotations

import os

_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")


def rank() -> int:
    """This process's rank; 0 where no launcher names one."""
    return _first(_RANK)[1]


def size() -> tuple[str, int]:
    """The variable that names the largest number of ranks, and that number; ("", 0) without one."""
    return max(sizes().items(), key=lambda found: found[1], default=("", 0))


def sizes() -> dict[str, int]:
    """What each variable says that names a number of ranks."""
    return {name: count for name, count in map(_first, ([name] for name in _SIZE)) if name}


def starts_only_open_mpi() -> bool:
    """Whether Open MPI's mpiexec started this process, and nothing else an MPICH could ask."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ and "PMI_SIZE" not in os.environ


def _first(names: list[str] | tuple[str, ...]) -> tuple[str, int]:
    for name in names:
        text = os.environ.get(name, "")
        if text.isdigit():
            return name, int(text)
    return "", 0
