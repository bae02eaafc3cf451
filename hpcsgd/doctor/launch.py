"""What the launcher said against what MPI sees."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hpcsgd import launcher
from hpcsgd.doctor.contract import Check, Facts, Finding, Ranks, group, shown
from hpcsgd.doctor.job import Job

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
    if not facts["launched"] or facts["size"] > 1:
        return
    variable, count = max(facts["launched"].items(), key=lambda item: int(item[1]))
    if count > 1:
        library = facts["mpi"] or "an MPI that does not start"
        yield Finding(
            "error",
            f"{_WHOSE[variable]} started {count} ranks ({variable}={count}), but each of them is alone: "
            f"mpi4py uses {library}, which does not understand this launcher",
            _fix(variable, facts),
        )


def _fix(variable: str, facts: Facts) -> str:
    if variable == "SLURM_STEP_NUM_TASKS":
        return (
            "srun --mpi=pmi2 (MPICH, Intel MPI) or --mpi=pmix (Open MPI), of those that srun --mpi=list shows; "
            "or mpiexec inside sbatch"
        )
    known = facts["mpiexec beside"]
    mine = f"with {known}" if known else "with the mpiexec of the MPI that mpi4py uses"
    return f"start {mine}; under Slurm with srun --mpi=pmi2 (MPICH) or srun --mpi=pmix (Open MPI)"


CHECK = Check("launcher", gather, show, judge)
