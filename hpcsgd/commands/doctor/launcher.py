"""What the launcher said against what MPI sees."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hpcsgd.commands.doctor.check import Check, Facts, Finding, Ranks, group, shown
from hpcsgd.commands.doctor.ranks import Job
from hpcsgd.mpi import launcher

#: Whose variable it is.
_WHOSE = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpiexec",
    "PMI_SIZE": "mpiexec of MPICH or Intel MPI, or srun --mpi=pmi2",
    "MPI_LOCALNRANKS": "mpiexec of MPICH or Intel MPI",
    "SLURM_STEP_NUM_TASKS": "srun",
}


def gather(job: Job) -> Facts:
    beside = Path(sys.executable).with_name("mpiexec")
    return {
        "launched": launcher.sizes(),
        "size": job.size,
        "mpiexec beside": str(beside) if beside.exists() else "",
        "mpiexec in PATH": shutil.which("mpiexec") or "",
    }


def show(ranks: Ranks) -> Iterator[str]:
    yield from shown(group(ranks, _text), ranks)
    path = ranks[0]["mpiexec in PATH"] or "none"
    beside = ranks[0]["mpiexec beside"]
    yield f"mpiexec in PATH: {path}" + (f"; beside Python: {beside}" if beside not in ("", path) else "")


def _text(facts: Facts) -> str:
    said = ", ".join(f"{name}={count}" for name, count in facts["launched"].items()) or "nothing"
    return f"the launcher says {said}; MPI sees {facts['size']}"


def judge(ranks: Ranks) -> Iterator[Finding]:
    facts = ranks[0]
    variable, count = max(facts["launched"].items(), key=lambda item: int(item[1]), default=("", 0))
    if facts["size"] == 1 < count:
        why = facts["mpi problem"] or f"mpi4py uses {facts['mpi']}, which does not understand this launcher"
        yield Finding(
            "error",
            f"{_WHOSE[variable]} started {count} ranks ({variable}={count}), but each is alone: {why}",
            _fix(variable, facts["mpiexec beside"]),
        )
    elif facts["mpi problem"]:
        yield Finding(
            "error",
            f"there is no MPI: {facts['mpi problem']}",
            "load the cluster's MPI module, or pip install '.[mpich]'",
        )


def _fix(variable: str, beside: str) -> str:
    slurm = "srun --mpi=pmi2 (MPICH, Intel MPI) or srun --mpi=pmix (Open MPI)"
    if variable == "SLURM_STEP_NUM_TASKS":
        return f"{slurm}, of those that srun --mpi=list shows; or mpiexec inside sbatch"
    return f"start with {beside or 'the mpiexec of the MPI that mpi4py uses'}; under Slurm with {slurm}"


CHECK = Check("launcher", gather, show, judge)
