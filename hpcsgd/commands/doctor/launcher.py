"""Checks that MPI has as many ranks as the launcher started."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from hpcsgd.commands.doctor.check import Check, Facts, FactsByRank, Finding, lines_by_value
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.mpi import launcher

#: The launchers that set each variable.
_LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpiexec",
    "PMI_SIZE": "mpiexec of MPICH or Intel MPI, or srun --mpi=pmi2",
    "MPI_LOCALNRANKS": "mpiexec of MPICH or Intel MPI",
    "SLURM_STEP_NUM_TASKS": "srun",
}


def collect(job: ExaminedJob) -> Facts:
    beside = Path(sys.executable).with_name("mpiexec")
    return {
        "launched": launcher.sizes(),
        "size": job.size,
        "mpiexec beside": str(beside) if beside.exists() else "",
        "mpiexec in PATH": shutil.which("mpiexec") or "",
    }


def describe(ranks: FactsByRank) -> Iterator[str]:
    yield from lines_by_value(ranks, _text)
    path = ranks[0]["mpiexec in PATH"] or "none"
    beside = ranks[0]["mpiexec beside"]
    yield f"mpiexec in PATH: {path}" + (f"; beside Python: {beside}" if beside not in ("", path) else "")


def _text(facts: Facts) -> str:
    variables = ", ".join(f"{name}={count}" for name, count in facts["launched"].items()) or "none"
    return f"variables of the launcher: {variables}; ranks in MPI: {facts['size']}"


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    facts = ranks[0]
    variable, count = max(facts["launched"].items(), key=lambda item: int(item[1]), default=("", 0))
    if facts["size"] == 1 < count:
        why = facts["mpi problem"] or f"mpi4py uses {facts['mpi']}, which does not support this launcher"
        yield Finding(
            "error",
            f"{_LAUNCHERS[variable]} started {count} ranks ({variable}={count}), but each is alone: {why}",
            _fix(variable, facts["mpiexec beside"]),
        )
    elif facts["mpi problem"]:
        yield Finding(
            "error",
            f"no MPI library: {facts['mpi problem']}",
            "load the MPI module of the cluster, or pip install '.[mpich]'",
        )


def _fix(variable: str, beside: str) -> str:
    slurm = "srun --mpi=pmi2 (MPICH, Intel MPI) or srun --mpi=pmix (Open MPI)"
    if variable == "SLURM_STEP_NUM_TASKS":
        return f"start with {slurm}, if srun --mpi=list shows it; or with mpiexec inside sbatch"
    return f"start with {beside or 'the mpiexec of the MPI that mpi4py uses'}; under Slurm with {slurm}"


CHECK = Check("launcher", collect, describe, diagnose)
