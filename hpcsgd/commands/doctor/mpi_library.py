"""Checks the MPI library: version, thread level, support of device memory and of failed ranks."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcsgd.commands.doctor.check import (
    Check,
    Facts,
    FactsByRank,
    Finding,
    lines_by_value,
    name_ranks,
    ranks_by_value,
)
from hpcsgd.commands.doctor.ranks import ExaminedJob
from hpcsgd.mpi import environment

_FAULT_TOLERANT = "OMPI_MCA_mpi_ft_enable"  # set by mpiexec --with-ft ulfm
_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")


def collect(job: ExaminedJob) -> Facts:
    if job.mpi is None:
        return {"mpi": "", "mpi problem": job.problem, "mpi cuda": None}
    name = job.mpi.Get_library_version()
    return {
        "mpi": _short(name),
        "mpi problem": "",
        "thread level": next(level for level in _LEVELS if job.mpi.Query_thread() == _value(job.mpi, level)),
        "failed ranks": _fault_tolerance(job.mpi, name),
        "mpi cuda": _cuda_support(),
        "cuda aware": environment.read("HPCSGD_CUDA_AWARE"),
    }


def _value(mpi: Any, level: str) -> int:
    return int(getattr(mpi, f"THREAD_{level}"))


def _short(library: str) -> str:
    """Name and version, such as "MPICH 5.0.2", from the text of MPI_Get_library_version."""
    first = library.splitlines()[0].split(",")[0].strip(" \0")
    return re.sub(r"\s*Version:\s*", " ", first)


def _fault_tolerance(mpi: Any, library: str) -> str:
    try:
        mpi.COMM_SELF.Is_revoked()
    except (AttributeError, NotImplementedError):
        return "no ULFM: a failed rank ends the job"
    if "Open MPI" not in library:
        return "its launcher ends the job when a rank fails"
    if os.environ.get(_FAULT_TOLERANT, "").lower() in ("1", "true", "yes"):
        return "ULFM is on: survivors of a failed rank can continue"
    return "ULFM is off; with mpiexec --with-ft ulfm survivors of a failed rank can continue"


def _cuda_support() -> bool | None:
    """The result of `MPIX_Query_cuda_support` of the loaded library; None if it has no such function."""
    maps = Path("/proc/self/maps")
    loaded = set(re.findall(r"/\S*/libmpi[^/\s]*\.so\S*", maps.read_text())) if maps.exists() else set()
    for path in sorted(loaded):
        try:
            return bool(ctypes.CDLL(path).MPIX_Query_cuda_support())
        except (OSError, AttributeError):
            continue
    return None


def describe(ranks: FactsByRank) -> Iterator[str]:
    yield from lines_by_value(ranks, _text)
    support = {True: "yes", False: "no", None: "unknown"}
    variable = {True: "set", False: "not set"}
    yield from lines_by_value(
        ranks,
        lambda facts: (
            f"CUDA-aware: {support[facts['mpi cuda']]}; "
            f"HPCSGD_CUDA_AWARE {variable[facts.get('cuda aware', False)]}"
        ),
    )


def _text(facts: Facts) -> str:
    if facts["mpi problem"]:
        return f"none: {facts['mpi problem']}"
    return f"{facts['mpi']}, MPI_THREAD_{facts['thread level']}; {facts['failed ranks']}"


def diagnose(ranks: FactsByRank) -> Iterator[Finding]:
    if ranks[0]["mpi problem"]:
        return  # the launcher check reports it
    libraries = ranks_by_value(ranks, lambda facts: facts["mpi"])
    if len(libraries) > 1:
        listed = "; ".join(f"{name}: {name_ranks(members, ranks)}" for name, members in libraries.items())
        fix = "load the same MPI module on all nodes"
        yield Finding("error", f"ranks use different MPI libraries ({listed})", fix)
    low = [rank for rank, facts in enumerate(ranks) if facts["thread level"] != "MULTIPLE"]
    if low:
        level = ranks[low[0]]["thread level"]
        yield Finding(
            "warning",
            f"MPI provides only MPI_THREAD_{level} on {name_ranks(low, ranks)}: communication does not "
            "overlap with computation, and asynchronous methods do not start",
            "use an MPI built with MPI_THREAD_MULTIPLE (MPICH: --enable-threads=multiple); a script must not "
            "initialise MPI with a lower level",
        )
    wrong = [r for r, facts in enumerate(ranks) if facts["cuda aware"] and facts["mpi cuda"] is False]
    if wrong:
        yield Finding(
            "error",
            f"HPCSGD_CUDA_AWARE=1 on {name_ranks(wrong, ranks)}, but this MPI is not CUDA-aware: it crashes "
            "on device memory",
            "unset HPCSGD_CUDA_AWARE, or use an MPI built with CUDA",
        )
    settings = ranks_by_value(ranks, lambda facts: facts["cuda aware"])
    if len(settings) > 1:
        yield Finding(
            "error",
            f"HPCSGD_CUDA_AWARE=1 on {name_ranks(settings[True], ranks)} only",
            "set it on all ranks: mpiexec -genv (MPICH), mpiexec -x (Open MPI), srun --export=ALL",
        )


CHECK = Check("MPI", collect, describe, diagnose)
