"""Environment variables of the launcher (mpiexec, srun) that started this process, read without MPI."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping

from hpcsgd.diagnostics import procfs

_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_TORCH = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def rank() -> int:
    """Return this process's rank; 0 without a launcher."""
    return _first(_RANK)[1]


def local_processes() -> dict[int, list[int]]:
    """Return the ids of this job's processes on this machine by rank, oldest first, as far as they are found.

    They have the launcher's variable, and descend from one of its processes: the nearest ancestor of this one
    without it. A rank may have several, such as a shell around it, and workers of its data loader.
    """
    variable, _ = _first(_RANK)
    if not variable:
        return {}
    found = defaultdict(list)
    for pid in procfs.children(_launcher_pid()):
        name, number = _first([variable], procfs.environment(pid))
        if name:
            found[number].append(pid)
    return dict(found)


def size() -> tuple[str, int]:
    """Return the variable with the largest number of ranks, and that number; ("", 0) without one."""
    return max(sizes().items(), key=lambda found: found[1], default=("", 0))


def is_on_one_machine() -> bool:
    """Return whether all ranks of the job are known to be on this machine; without a launcher they are."""
    return _first(_LOCAL_SIZE)[1] == size()[1]


def shows_all_ranks() -> bool:
    """Return whether all ranks of the job are on this machine, and not in containers that hide processes."""
    return is_on_one_machine() and _launcher_pid() > 1


def _launcher_pid() -> int:
    """Id of the launcher's process above this one; 0 or 1 if a namespace of process ids begins below it."""
    found = _first(_RANK)
    above = procfs.parent(os.getpid())
    while _first([found[0]], procfs.environment(above)) == found:
        above = procfs.parent(above)
    return above


def sizes() -> dict[str, int]:
    """Return the number of ranks by variable, for all variables that are set."""
    return {name: count for name, count in map(_first, ([name] for name in _SIZE)) if name}


def names_processes_only() -> bool:
    """Return whether the launcher is that of MPICH, which reports a rank that was killed by its process."""
    return "HYDI_CONTROL_FD" in os.environ


def starts_only_open_mpi() -> bool:
    """Return whether Open MPI's mpiexec started this process, and no variable of an MPICH launcher is set."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ and "PMI_SIZE" not in os.environ


def other_launcher() -> tuple[str, int]:
    """Return the launcher that is not of MPI and has started this process, and its number of processes.

    Such as torchrun and `accelerate launch`, which set these three variables; ("", 0) without one.
    """
    values = [os.environ.get(name, "") for name in _TORCH]
    if not all(value.isdigit() for value in values):
        return "", 0
    name = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "the launcher that sets WORLD_SIZE"
    return name, int(values[0])


def _first(
    names: list[str] | tuple[str, ...], environment: Mapping[str, str] = os.environ
) -> tuple[str, int]:
    for name in names:
        text = environment.get(name, "")
        if text.isdigit():
            return name, int(text)
    return "", 0
